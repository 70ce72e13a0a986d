"""The loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from pretrain.engine.engine import Layout
from pretrain.engine.guards import Guard
from pretrain.engine.schedule import Averaging, Schedule
from pretrain.engine.step import accumulate, agree, seed_step, update
from pretrain.images.mixup import mix_images
from pretrain.images.transforms import to_float
from pretrain.ranks.collectives import World
from pretrain.ranks.stop import Stop
from pretrain.ranks.watchdog import Watchdog
from pretrain.record.audit import Audit
from pretrain.record.inspection import Inspection
from pretrain.record.meters import Meters
from pretrain.record.quarantine import Quarantine
from pretrain.run.evaluation import Evaluator, evaluate
from pretrain.run.loss import Loss
from pretrain.run.saver import Saver
from pretrain.stream.loader import Batch


def train(
    engine: Any,
    batches: Iterator[Batch],
    loss_of: Loss,
    schedule: Schedule,
    averaging: Averaging,
    layout: Layout,
    *,
    start: int,
    missed: bool,
    seed: int,
    world: World,
    dtype: torch.dtype,
    meters: Meters,
    audit: Audit,
    quarantine: Quarantine,
    guard: Guard,
    inspection: Inspection,
    evaluators: Sequence[Evaluator],
    saver: Saver,
    stop: Stop,
    watchdog: Watchdog,
) -> bool:
    """Train from step `start` to the schedule's end; whether it got there, or was asked to stop before.

    missed: the evaluation after `start` steps, if one is due then, is still to be made.

    Raises:
        InputError: the data cannot be read, or a checkpoint not written.
        DivergedError, RollBack: as `guard` says.
    """
    if missed:  # whoever stopped or was killed between a save and its evaluation
        with meters.pause():
            if not evaluate(evaluators, engine, start, meters, watchdog, stop, world, last=start == schedule.steps):
                return False
    for step in range(start, schedule.steps):
        engine.train()
        seed_step(seed, step, world)

        watchdog.beat(step, "data")
        step_loss = torch.zeros((), device=world.device)
        for batch in meters.waiting(islice(batches, layout.accumulation)):
            audit.add(batch.ids)
            quarantine.add(batch)
            batch = batch.to(world.device)
            images = mix_images(to_float(batch.images, dtype), batch.weight)
            watchdog.beat(step, "forward")
            with meters.forward():
                loss = loss_of(engine(images), batch.labels, batch.valid, batch.weight)
            watchdog.beat(step, "backward")
            accumulate(engine, loss)
            step_loss += loss.detach() / layout.accumulation
            watchdog.beat(step, "data")

        watchdog.beat(step, "update")
        done, last = step + 1, step + 1 == schedule.steps
        word = agree(world, step_loss, stop.asked(), quarantine.pending, saver.due(done), saver.writing)
        stopping, faulty, saving, writing = word.flags
        if faulty:
            with saver.saved_before(step):
                quarantine.settle(step)
        refused = guard.refuses(step, word.loss)
        decay = averaging(engine.basic_optimizer.updates)
        grad_norm, refused = update(engine, lr=schedule(step), decay=decay, refused=refused)
        if refused and guard.calm and not guard.avoids(step):
            watchdog.beat(step, "save")
            inspection.keep(step, audit.ids, float(step_loss), refused)
        audit.step(step)
        meters.step(done, word.loss, schedule(step), grad_norm, skipped=refused is not None)
        guard.note(step, word.loss, grad_norm, refused)
        stopping &= not last
        with meters.pause():
            if not writing:
                saver.settle()
            if saving or stopping or last:
                watchdog.beat(step, "save")
                saver.save(done, wait=stopping or last)  # before the evaluation, which may fail
            if not stopping:  # the grace period is for the checkpoint
                with saver.saved_before(done):
                    stopping = not evaluate(evaluators, engine, done, meters, watchdog, stop, world, last=last)
                if stopping:
                    watchdog.beat(step, "save")
                    saver.ensure(done)
        if stopping:
            return False
    return True
