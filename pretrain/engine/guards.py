"""What ends a run rather than let it go on wrong."""

from __future__ import annotations

import math


class DivergedError(RuntimeError):
    """The gradients are no longer numbers: nothing trained from here on is worth keeping."""


def check_finite(step: int, grad_norm: float | None) -> None:
    """Raise where the global gradient norm of step `step` (from 0), the same on every rank, is not finite.

    A loss that is not finite has such a gradient. Raised before the step is saved, so that no checkpoint holds it.
    """
    if grad_norm is not None and (not math.isfinite(grad_norm) or grad_norm < 0):
        raise DivergedError(
            f"step {step + 1}: the gradient norm is {grad_norm}. The checkpoints are of earlier steps and are whole; "
            "a lower optimizer.lr, a longer schedule.warmup_steps or optimizer.clip_norm=1 may help"
        )
