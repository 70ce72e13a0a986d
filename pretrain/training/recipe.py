"""What a run computes, whatever ranks compute it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.engine.engine import precision
from pretrain.engine.layout import Layout, batch_layout
from pretrain.engine.schedule import Averaging, Schedule
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.model.depth import frozen_depth
from pretrain.training.config import RunConfig
from pretrain.training.loss import Loss, choose_loss


@dataclass(frozen=True)
class Recipe:
    """The function that training computes: with the same batches, any ranks arrive at the same weights."""

    loss: Loss
    schedule: Schedule
    averaging: Averaging
    layout: Layout  # of a global batch over ranks and micro-batches
    seed: int
    dtype: torch.dtype
    frozen: int  # the depth below which the network is not trained

    @classmethod
    def of(cls, config: RunConfig, index: Index, ranks: int, samples: int | None = None) -> Recipe:
        """The recipe of `config` for so many samples of `index` (None: all) on so many ranks.

        Raises:
            InputError: batch and ranks do not divide, the loss is not defined for these labels, or more blocks are
                to be frozen than there are.
        """
        return cls(
            choose_loss(config.train.loss, index.one_label, config.train.label_smoothing),
            Schedule(config.schedule, config.optimizer.lr, run_steps(config, samples or index.samples)),
            Averaging(config.optimizer.averaging),
            batch_layout(config.train.global_batch, config.train.micro_batch, ranks),
            config.seed,
            precision(config.deepspeed),
            frozen_depth(config.train.freeze, config.model.spec().layers),
        )

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.schedule.steps

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in each step."""
        return self.layout.accumulation


def run_steps(config: RunConfig, samples: int) -> int:
    """`train.steps`, or round(epochs · samples / global batch)."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    steps = round(config.train.epochs * samples / config.train.global_batch)
    if steps < 1:
        raise InputError(
            f"train.epochs: {config.train.epochs} of {samples} samples in batches of {config.train.global_batch} is no "
            "whole step; train longer, or set a smaller train.global_batch"
        )
    return steps
