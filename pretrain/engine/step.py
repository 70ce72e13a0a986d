"""The parts of a training step: gradients are accumulated, the ranks agree, an update is made or held back."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine.quiet import get_accelerator
from pretrain.engine.zero.norm import gradient_norm, known
from pretrain.ranks.collectives import World

_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Agreement:
    """What all ranks know between the last backward pass of a step and its update. The same on every rank."""

    loss: float  # mean over the global batch
    flags: tuple[bool, ...]  # each: whether at least one rank raises it
    norm: float | None = None  # the `gradient_norm`, where one was given


@dataclass(frozen=True)
class Update:
    """What became of a step's update. The same on every rank."""

    lr: float
    grad_norm: float  # global, before clipping
    skipped: str | None  # why weights and optimizer stayed as they were; None: the update was made


def seed_step(seed: int, step: int, world: World) -> None:
    """Make torch's draws in a step (dropout masks) a function of (seed, step, rank): no random state to save."""
    # Distinct for every step and rank of a run, and 64 bits wide as torch wants it.
    torch.manual_seed((seed * 1_000_003 + step) * 100_003 + world.rank & (2**63 - 1))


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """If `wanted`, torch takes only kernels inside that give the same bits each time.

    On a GPU the backward passes of its fastest attention do not: they add up in the order in which they get there.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch demands, and takes on new GPUs anyway
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # which costs time, and finds mistakes that are not made here
    try:
        yield
    finally:
        if wanted:
            torch.use_deterministic_algorithms(before[0])
            settings.fill_uninitialized_memory = before[1]


def accumulate(engine: Any, loss: Tensor) -> None:
    """Add up the gradients of a micro-batch; `update` must follow the last of a step."""
    engine.backward(loss)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # counts the micro-batch, no more


def agree(world: World, loss: Tensor, *flags: bool, norm: Tensor | None = None) -> Agreement:
    """The mean of the ranks' losses, with the same bits on all, and which flags any rank raises. One collective.

    The one place of a step where the host waits for the device: everything that it needs is read together.

    Args:
        world: the ranks.
        loss: this rank's, a scalar on the device.
        flags: this rank's.
        norm: the ranks' `gradient_norm`, for `update`.
    """
    row = torch.tensor([0.0, 0.0, *flags], dtype=torch.float64)
    if world.device.type != "cpu":
        row = get_accelerator().pin_memory(row).to(world.device, non_blocking=True)
    row[0] = loss.detach()
    if norm is not None:
        row[1] = norm
    rows = row
    if world.size > 1:
        rows = torch.empty(world.size * len(row), dtype=row.dtype, device=row.device)
        dist.all_gather_into_tensor(rows, row)
    table = rows.view(world.size, -1).tolist()
    return Agreement(
        sum(row[0] for row in table) / world.size,
        tuple(any(row[column] for row in table) for column in range(2, len(row))),
        None if norm is None else table[0][1],
    )


def update(
    engine: Any, *, lr: float, decay: float | None = None, refused: str | None = None, norm: float | None = None
) -> Update:
    """Clip the accumulated gradients and update the weights, unless the gradients are not finite or it is refused.

    Args:
        engine: after the last backward pass of a step.
        lr: the schedule's learning rate; a group's `lr_scale` times it is the group's.
        decay: of the averaged weights; None where there are none.
        refused: why weights and optimizer must stay as they are; None: the update is wanted.
        norm: the `gradient_norm` that the ranks agreed on; None: it is read here.

    Dynamic loss scaling skips updates while it searches its scale. That does not count as skipped until the scale is
    at its minimum.
    """
    optimizer = engine.basic_optimizer
    if norm is None and (found := gradient_norm(engine)) is not None:
        norm = found.item()
    without_zero = engine.zero_optimization_stage() == 0
    if without_zero and refused is None and norm is not None and not math.isfinite(norm):
        refused = _not_finite(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.hold, optimizer.decay = refused is not None, decay
    searching = _searches_scale(engine)
    with nullcontext() if norm is None else known(engine, norm):
        engine.step()
    optimizer.hold = False
    if not engine.was_step_applied():
        _drop_gradients(engine)
    if norm is None or not without_zero:  # of a step that DeepSpeed skips infinite, and without the loss scale
        norm = float(engine.get_global_grad_norm())
    if refused is None and engine.was_step_applied():
        optimizer.updates += 1
    elif refused is None and not searching:
        refused = _not_finite(norm)
    return Update(lr, norm, refused)


def _drop_gradients(engine: Any) -> None:
    """Drop the gradients of an update that DeepSpeed skipped.

    DeepSpeed 0.19.8 does so itself, except in half precision under ZeRO 1 and 2 with the optimizer on the CPU: values
    that are not finite would stay in the sum, and no update would ever be made again.
    """
    if engine.zero_optimization_stage() in (1, 2):
        partitions = getattr(engine.optimizer, "averaged_gradients", {})
        partitions.update(dict.fromkeys(partitions))


def loss_scale(engine: Any) -> dict[str, float]:
    """The state of dynamic loss scaling; empty where there is none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in _SCALE}


def _searches_scale(engine: Any) -> bool:
    """Whether an overflow now belongs to dynamic loss scaling, which can still lower its scale."""
    if not loss_scale(engine):
        return False
    scaler = engine.optimizer.loss_scaler
    scaler.raise_error_at_min_scale = False  # the guard decides what follows, not an exception
    return bool(scaler.cur_scale > scaler.min_scale)


def set_loss_scale(engine: Any, state: dict[str, float]) -> None:
    """Restore what `loss_scale` returned, where this run scales its loss."""
    for name, value in state.items() if loss_scale(engine) else ():
        setattr(engine.optimizer.loss_scaler, name, value)


def _not_finite(norm: float) -> str:
    return f"the gradient norm is {norm}"
