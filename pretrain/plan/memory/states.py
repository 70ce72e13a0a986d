"""Bytes of the training state that a rank holds from step to step: exact, with DeepSpeed's padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import torch

from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.section import OptimizerSection
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.plan.job import Job

FP32 = 4  # bytes
_ALIGNED = 2  # ZeRO 1 and 2 pad each group of parameters to a multiple of so many values a rank


@dataclass(frozen=True)
class States:
    """Bytes that a rank holds from step to step, by what they are and where they lie."""

    parameters: int  # that the network computes with
    gradients: int  # between two backward passes, at the most
    optimizer: int  # fp32 weights, where they are not the parameters themselves, and moments
    average: int
    on_host: int = 0  # of these, in the host's memory instead of the device's

    @property
    def on_device(self) -> int:
        """Bytes in the device's memory."""
        return self.parameters + self.gradients + self.optimizer + self.average - self.on_host


@dataclass(frozen=True)
class Optimized:
    """What the optimizer updates, and what it keeps of it."""

    groups: tuple[tuple[int, ...], ...]  # values of each parameter, by group, in the optimizer's order
    trained: tuple[bool, ...]  # whether a group is updated
    moments: int  # how many
    moment_bytes: int  # of a value
    counts: bool  # whether the number of updates is kept beside them
    averages: bool

    @property
    def values(self) -> int:
        """Of all parameters."""
        return sum(map(sum, self.groups))

    @property
    def trained_values(self) -> int:
        """Of all parameters that are updated."""
        return sum(sum(group) for group, trained in zip(self.groups, self.trained, strict=True) if trained)


def optimized(job: Job) -> Optimized:
    """The groups of parameters that the engine's optimizer makes of the network."""
    return _optimized(job.spec, job.frozen, job.optimizer.model_dump_json())


@cache
def _optimized(spec: ViTSpec, frozen: int, section: str) -> Optimized:
    with torch.device("meta"):
        model = VisionTransformer(replace(spec, dropout=0.0), frozen=frozen)
        optimizer = build_optimizer(model, OptimizerSection.model_validate_json(section))
    return Optimized(
        tuple(tuple(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups),
        tuple(group["lr_scale"] != 0 for group in optimizer.param_groups),
        len(optimizer.moments),
        optimizer.moment_dtype.itemsize,
        isinstance(optimizer, torch.optim.AdamW),
        optimizer.averages,
    )


def states(job: Job) -> States:
    """The training state of the rank that holds most."""
    found, size = optimized(job), job.dtype.itemsize
    held = partition(job)  # values of which the rank keeps the optimizer's state
    # The number of updates, fp32, for each tensor that is updated.
    tensors = sum(map(len, found.groups)) if job.stage == 0 else len(found.groups)
    moments = found.moments * found.moment_bytes * held + (FP32 * tensors if found.counts else 0)
    weights = FP32 * held if separate_weights(job) else 0
    average = FP32 * held if found.averages else 0
    parameters = size * (held if job.stage == 3 else padded(job) if job.stage else found.values)
    on_host = 0
    if job.device != "cpu":  # of a CPU the host's memory is the device's
        on_host = (weights + moments + average) * offloads(job) + parameters * offloads_parameters(job)
    return States(parameters, gradient_bytes(job), weights + moments, average, on_host)


def padded(job: Job) -> int:
    """Values of all parameters under ZeRO 1 and 2, which pad each group."""
    unit = _ALIGNED * job.layout.ranks
    return sum(ceil(sum(group) / unit) * unit for group in optimized(job).groups)


def partition(job: Job) -> int:
    """Values of which one rank keeps the optimizer's state."""
    ranks = job.layout.ranks
    if job.stage == 0:
        return optimized(job).values
    if job.stage < 3:
        return padded(job) // ranks
    return sum(ceil(values / ranks) for group in optimized(job).groups for values in group)


def separate_weights(job: Job) -> bool:
    """Whether fp32 weights are kept beside the parameters that the network computes with."""
    return job.stage > 0 and not held_once(job)


def held_once(job: Job) -> bool:
    """Whether ZeRO 1 and 2 keep weights and gradients once, which the engine brings about for most fp32 runs.

    The conditions are those of `engine.once`.
    """
    zero = job.deepspeed.zero_optimization
    plain = zero.contiguous_gradients is not False and not (zero.overlap_comm or zero.reduce_scatter)
    return job.stage in (1, 2) and job.dtype is torch.float32 and plain and not offloads(job)


def offloads(job: Job) -> bool:
    """Whether the optimizer's state is kept in the host's memory."""
    offload = job.deepspeed.zero_optimization.offload_optimizer
    return offload is not None and offload.device == "cpu"


def offloads_parameters(job: Job) -> bool:
    """Whether ZeRO 3 keeps its part of the parameters in the host's memory, and the gradients' with it."""
    offload = job.deepspeed.zero_optimization.offload_param
    return offload is not None and offload.device == "cpu"


def flat_gradients(job: Job) -> bool:
    """Whether all gradients lie in flat fp32 tensors that are never freed: the engine's or DeepSpeed's for bf16."""
    return job.stage == 1 and (held_once(job) or (job.dtype is torch.bfloat16 and not offloads(job)))


def gradient_bytes(job: Job) -> int:
    """Of the gradients that a rank holds between backward passes, at the most."""
    found = optimized(job)
    if flat_gradients(job):  # bf16: with those of the last backward pass, which have been added
        return FP32 * padded(job) + (0 if held_once(job) else job.dtype.itemsize * found.trained_values)
    if job.stage == 1:
        return FP32 * found.trained_values
    return FP32 * (found.values if job.stage == 0 else partition(job))
