"""The loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from pretrain.engine.distributed import World
from pretrain.engine.engine import Layout, seed_step, take_step
from pretrain.engine.guards import check_finite
from pretrain.engine.optimizer import set_learning_rate
from pretrain.engine.schedule import Schedule
from pretrain.engine.stop import Stop
from pretrain.run.audit import Audit
from pretrain.run.evaluation import Evaluator, evaluate
from pretrain.run.loss import Loss
from pretrain.run.meters import Meters
from pretrain.run.saver import Saver
from pretrain.stream.images import to_float
from pretrain.stream.loader import Batch


def train(
    engine: Any,
    batches: Iterator[Batch],
    loss_of: Loss,
    schedule: Schedule,
    layout: Layout,
    *,
    start: int,
    seed: int,
    world: World,
    dtype: torch.dtype,
    meters: Meters,
    audit: Audit,
    evaluators: Sequence[Evaluator],
    saver: Saver,
    stop: Stop,
) -> bool:
    """Train from step `start` to the schedule's end; whether it got there, or was asked to stop before."""
    for step in range(start, schedule.steps):
        engine.train()
        seed_step(seed, step, world)
        set_learning_rate(engine.optimizer, schedule(step))

        step_loss = torch.zeros((), device=world.device)
        for batch in meters.waiting(islice(batches, layout.accumulation)):
            images = to_float(batch.images.to(world.device, non_blocking=True), dtype)
            labels, valid = batch.labels.to(world.device), batch.valid.to(world.device)
            loss = loss_of(engine(images), labels, valid)
            engine.backward(loss)
            grad_norm = take_step(engine)
            step_loss += loss.detach() / layout.accumulation
            audit.add(batch.ids)

        check_finite(step, grad_norm)
        audit.step(step)
        meters.step(step + 1, step_loss, schedule(step), grad_norm)
        last = step + 1 == schedule.steps
        stopping = not last and stop.requested()
        with meters.pause():
            saver.maybe(step + 1, now=last or stopping)  # first: what evaluation may fail on must not cost the step
            if not stopping:  # the grace period is for the checkpoint
                evaluate(evaluators, engine, step + 1, meters, last=last)
        if stopping:
            return False
    return True
