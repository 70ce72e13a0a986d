"""What is planned: all of a run's config that its cost is a function of, and the machines that it is to run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from pretrain.checkpoint.section import CheckpointSection
from pretrain.engine.layout import Layout
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.model.spec import ViTSpec
from pretrain.stream.section import DataSection


@dataclass(frozen=True)
class Job:
    """All of a run that memory, time and traffic are a function of. `RunConfig.job` makes one."""

    spec: ViTSpec
    layout: Layout  # of the global batch over ranks and micro-batches
    dtype: torch.dtype  # that the network computes in
    loss: Literal["sigmoid", "softmax"]
    checkpointing: Any  # `pretrain.model.block.Checkpointing`
    compiled: bool
    frozen: int  # the depth below which nothing is trained (`model.depth`)
    optimizer: OptimizerSection
    deepspeed: DeepSpeedSection
    data: DataSection
    checkpoint: CheckpointSection
    steps: int | None  # of the whole run; None: not known
    device: Literal["cpu", "cuda"]  # the kind that the ranks compute on

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.deepspeed.stage


@dataclass(frozen=True)
class Cluster:
    """The machines of a run. All of a kind."""

    nodes: int
    devices: int  # of a node
    device_memory: int  # bytes of a device; of a CPU: of the whole host, which its ranks share
    peak_flops: float | None  # of a device, in the type computed in; None: not known
    device_name: str = ""  # as the driver tells it; empty: not known

    @property
    def ranks(self) -> int:
        """Of the run: one for each device."""
        return self.nodes * self.devices
