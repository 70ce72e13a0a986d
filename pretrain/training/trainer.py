"""The loop."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from pretrain.engine.guards import Guard
from pretrain.engine.step import accumulate, agree, seed_step, update
from pretrain.engine.zero.norm import gradient_norm
from pretrain.images.mixing import mix_images
from pretrain.images.transforms import to_float
from pretrain.ranks.collectives import World
from pretrain.record.ledger import Ledger
from pretrain.record.pulse import Pulse
from pretrain.stream.loader import Batch
from pretrain.training.keeper import Keeper
from pretrain.training.recipe import Recipe


def train(
    engine: Any,
    batches: Iterator[Batch],
    recipe: Recipe,
    *,
    start: int,
    world: World,
    pulse: Pulse,
    ledger: Ledger,
    guard: Guard,
    keeper: Keeper,
) -> bool:
    """Train from step `start` to the schedule's end; False if the run was asked to stop before.

    Raises:
        InputError: the data cannot be read, or a checkpoint not written.
        DivergedError, RollBack: as `guard` says.
    """
    for step in range(start, recipe.steps):
        engine.train()
        seed_step(recipe.seed, step, world)

        step_loss = torch.zeros((), device=world.device)
        for batch in pulse.batches(step, islice(batches, recipe.accumulation)):
            ledger.add(batch)
            batch = batch.to(world.device)
            images = mix_images(to_float(batch.images, recipe.dtype), batch.weight, batch.boxes)
            with pulse.forward(step):
                loss = recipe.loss(engine(images), batch.labels, batch.valid, batch.weight)
            accumulate(engine, loss)
            step_loss += loss.detach() / recipe.accumulation

        pulse.beat(step, "update")
        flags = ledger.faulty, *keeper.requests(step + 1)
        agreed = agree(world, step_loss, *flags, norm=gradient_norm(engine))
        faulty, *requests = agreed.flags
        if faulty:
            ledger.check(step)
        lr, refused = recipe.schedule(step), guard.refuses(step, agreed.loss)
        decay = recipe.averaging(engine.basic_optimizer.updates)
        made = update(engine, lr=lr, decay=decay, refused=refused, norm=agreed.norm)
        if made.skipped and guard.calm(step):
            pulse.beat(step, "save")
            with pulse.paused("saving"):
                ledger.inspect(step, float(step_loss), made.skipped)
        ledger.step(step, agreed, made, pulse)
        guard.note(step, agreed.loss, made.grad_norm, made.skipped)
        if not keeper.step(step + 1, *requests):
            return False
    return True
