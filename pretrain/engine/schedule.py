"""The learning rate and the averaging as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.errors import InputError


@dataclass(frozen=True)
class Averaging:
    """The decay of the weights' Polyak average as a function of the step: 0 before `start_step`, then `decay`."""

    decay: float = 0.0
    start_step: int = 0

    def __call__(self, step: int) -> float:
        """The decay with the update that takes step `step` (from 0) to step + 1; with 0 the average is the weights."""
        return self.decay if step >= self.start_step else 0.0


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then decay from `lr` to `final_lr` over the rest of `steps`.

    Decay progress counts from the end of the warm-up (the paper's public code; Table 3 and Appendix B.1).
    """

    lr: float
    steps: int
    warmup_steps: int
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_steps >= self.steps:
            raise InputError(
                f"schedule.warmup_steps: {self.warmup_steps} warm-up steps leave none of the run's {self.steps} to "
                f"train at the full rate; set schedule.warmup_steps below {self.steps}, or train longer"
            )
        if self.final_lr > self.lr:
            raise InputError(f"schedule.final_lr: {self.final_lr} is above optimizer.lr {self.lr}; it must not be")

    def __call__(self, step: int) -> float:
        """The learning rate of the update that takes step `step` (from 0) to step + 1."""
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        if self.decay == "linear":
            left = 1.0 - progress
        elif self.decay == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            left = 1.0
        return self.final_lr + (self.lr - self.final_lr) * left
