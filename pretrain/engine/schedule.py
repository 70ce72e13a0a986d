"""Learning rate and averaging as functions of steps and updates made: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pretrain.errors import InputError
from pretrain.section import Section, key


class AveragingSection(Section):
    """The Polyak average of the weights, average ← decay · average + (1 − decay) · weights after each update."""

    decay: float = key(0.9999, about="Share of the average that an update leaves.", ge=0, lt=1)
    start_step: int = key(0, about="Updates before which the average is the weights themselves.", ge=0)
    debias: bool = key(True, about="Whether the weights that averaging began from have no share in it.", before=False)


class ScheduleSection(Section):
    """Linear warm-up from 0, then decay to `final_lr` over the steps that are left."""

    warmup_steps: int = key(10_000, about="Steps of linear warm-up from 0.", resume="extendable", ge=0)
    decay: Literal["linear", "cosine", "constant"] = key(
        "linear", about="How the learning rate falls after the warm-up.", resume="extendable"
    )
    final_lr: float = key(0.0, about="The learning rate at the end.", resume="extendable", ge=0)


@dataclass(frozen=True)
class Averaging:
    """The decay of the weights' Polyak average as a function of the updates made.

    Before `start_step` updates it is 0: the average is the weights. From then on, with w_1 … w_t the weights after each
    of the t updates made since:

        debias      average_t = Σ_i decay^(t−i) · (1 − decay) · w_i / (1 − decay^t)
        otherwise   the same sum without its divisor, and decay^t · (the weights that averaging began from)

    The weights that averaging began from (at the start of a run, drawn from the seed, or a head of zeros) have no share
    in the debiased average; otherwise, at 0.9999, 37 % after 10,000 updates and 13.5 % after 20,000.
    """

    section: AveragingSection | None = None  # None: no average

    def __call__(self, updates: int) -> float:
        """The decay d of average ← d · average + (1 − d) · weights with the update that follows `updates` others."""
        section = self.section
        if section is None or updates < section.start_step or not section.decay:
            return 0.0
        if not section.debias:
            return section.decay
        before = updates - section.start_step  # updates in the average
        # The weights have 1 − decay of a sum whose shares add up to 1 − decay^t.
        rate = math.log(section.decay)
        return section.decay * math.expm1(before * rate) / math.expm1((before + 1) * rate)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then decay from `lr` to `final_lr` over the rest of `steps`.

    Decay progress counts from the end of the warm-up (the paper's public code; Table 3 and Appendix B.1). A warm-up
    longer than the run is cut off with it.
    """

    section: ScheduleSection
    lr: float
    steps: int

    def __post_init__(self) -> None:
        if self.section.final_lr > self.lr:
            raise InputError(
                f"schedule.final_lr: {self.section.final_lr} is above optimizer.lr {self.lr}; it must not be"
            )

    def __call__(self, step: int) -> float:
        """The learning rate of the update that takes step `step` (from 0) to step + 1."""
        if step < self.section.warmup_steps:
            return self.lr * step / self.section.warmup_steps
        progress = (step - self.section.warmup_steps) / max(self.steps - self.section.warmup_steps, 1)
        if self.section.decay == "linear":
            left = 1.0 - progress
        elif self.section.decay == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            left = 1.0
        return self.section.final_lr + (self.lr - self.section.final_lr) * left
