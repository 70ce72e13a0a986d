"""What DeepSpeed holds beside the training state at each moment of a step: buckets, flat copies, gathered parameters.

Read in DeepSpeed 0.19.8's `stage_1_and_2.py`, `stage3.py` and `partitioned_param_coordinator.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch

from pretrain.plan.job import Job
from pretrain.plan.memory.activations import Part
from pretrain.plan.memory.states import FP32, optimized, partition, states

REDUCE_BUCKET = 50_000_000  # values, where the config names none (`engine.engine`)
_REDUCE_WITHOUT_ZERO = 500_000_000  # values, of a bucket that DeepSpeed fills without ZeRO
_PERSISTENT, _REUSE, _PREFETCH = 100_000, 1_000_000_000, 50_000_000  # values: DeepSpeed's defaults at stage 3
_NORM = 8  # bytes of a value in which DeepSpeed takes the norm of a gradient, one tensor at a time


@dataclass(frozen=True)
class Moment:
    """Bytes that differ within a step."""

    name: str
    gradients: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.gradients + self.activations + self.buffers


def moments(job: Job, parts: list[Part]) -> Iterator[Moment]:
    """The moments of a step between which a rank's memory is highest."""
    whole, keeps = states(job).gradients, job.layout.accumulation > 1
    resting = gathered(job) + (_bucket(job, _bucket_values(job)) if job.stage == 3 else 0)
    steady = whole if keeps or job.stage == 3 else 0
    before = _batch(job)
    for part in parts:
        yield Moment("forward", steady, before + part.forward, resting)
        before += part.kept
    later = 0
    for part in reversed(parts):
        before -= part.kept
        held, buffers = _while_reducing(job, later)
        yield Moment("backward", max(steady, held), before + part.backward, resting + buffers)
        later += part.gradients // job.dtype.itemsize
    held, buffers = _while_reducing(job, later)
    yield Moment("reduction", max(held, steady), before, resting + buffers + _reduction(job))
    yield Moment("update", _updating(job), before, resting + _flat(job))


def gathered(job: Job) -> int:
    """Bytes of parameters that are gathered at a time under ZeRO 3; with one rank nothing is."""
    ranks = job.layout.ranks
    if job.stage < 3 or ranks == 1:
        return 0
    zero = job.deepspeed.zero_optimization
    threshold = _set(zero.stage3_param_persistence_threshold, _PERSISTENT)
    values = [value for group in optimized(job).groups for value in group]
    small = sum(value for value in values if value <= threshold)
    # A parameter is kept after the forward pass where its use in the backward pass is nearer than the reuse distance.
    near = min(_set(zero.stage3_max_reuse_distance, _REUSE) // 2, sum(values) - small)
    ahead = _set(zero.stage3_prefetch_bucket_size, _PREFETCH)
    largest = max(values)
    # What is gathered together lies there twice for a moment: as the ranks sent it, and cut into parameters.
    together = min(ahead, sum(values)) + largest
    return job.dtype.itemsize * (small + min(near + together, sum(values)) + together)


def _while_reducing(job: Job, values: int) -> tuple[int, int]:
    """Bytes of gradients, and of buffers they pass through, once so many values have their gradients."""
    size, ranks = job.dtype.itemsize, job.layout.ranks
    if job.stage < 2:
        return (FP32 if job.stage else size) * values, 0
    full = _bucket_values(job)
    if job.stage == 3:
        return 0, 0
    reduced = values // full * full
    return FP32 * reduced // ranks, _bucket(job, min(values, full))


def _reduction(job: Job) -> int:
    """Bytes that the exchange of gradients adds at the end of the backward pass."""
    values, full = optimized(job).values, _bucket_values(job)
    if job.stage == 0:
        return FP32 * min(values, _REDUCE_WITHOUT_ZERO)
    if job.stage == 1:
        return _bucket(job, min(values, full))
    if job.stage == 2:
        return FP32 * values // job.layout.ranks - FP32 * (values // full * full) // job.layout.ranks
    return FP32 * min(values, full)


def _updating(job: Job) -> int:
    """Bytes of gradients while weights are updated."""
    return states(job).gradients if job.stage in (0, 3) else FP32 * partition(job)


def _flat(job: Job) -> int:
    """Bytes of the gradients' flat copy, one group of parameters at a time, or of a tensor in the norm's type."""
    largest = max(value for group in optimized(job).groups for value in group)
    if job.stage == 0:
        return 0
    ranks = job.layout.ranks
    copied = max(ceil(sum(group) / ranks) for group in optimized(job).groups)
    return max(FP32 * copied, _NORM * ceil(largest / ranks))


def _bucket(job: Job, filled: int) -> int:
    """Bytes of a bucket in which so many values have been: the system gives a CPU only memory that is written to."""
    values = filled if job.device == "cpu" else _bucket_values(job)
    size = FP32 if job.stage == 1 else job.dtype.itemsize
    overlap = job.deepspeed.zero_optimization.overlap_comm
    return size * values * (2 if overlap and job.stage < 3 else 1)


def _bucket_values(job: Job) -> int:
    return _set(job.deepspeed.zero_optimization.reduce_bucket_size, REDUCE_BUCKET)


def _batch(job: Job) -> int:
    """Bytes of a micro-batch: bytes as they are sent to a device, and in the type computed in."""
    spec = job.spec
    pixels = job.layout.micro_batch * spec.channels * spec.image_size**2
    if job.device == "cpu":  # fp32 from the loader
        return FP32 * pixels + (0 if job.dtype is torch.float32 else job.dtype.itemsize * pixels)
    return (1 + job.dtype.itemsize) * pixels


def _set(value: int | None, default: int) -> int:
    return default if value is None else value
