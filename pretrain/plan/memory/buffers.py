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
from pretrain.plan.memory.states import (
    FP32,
    flat_gradients,
    held_once,
    offloads,
    offloads_parameters,
    optimized,
    padded,
    partition,
    states,
)

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
    whole = states(job).gradients
    # Gradients that are there all the time, or from one backward pass to the next.
    always = whole if job.stage == 3 or flat_gradients(job) else 0
    steady = whole if job.layout.accumulation > 1 else always
    if job.stage == 3 and job.device != "cpu" and offloads(job):  # they lie on the host
        whole = always = steady = 0
    kept = _batch(job)
    bucket = _bucket(job, min(optimized(job).values, _bucket_values(job))) if job.stage == 3 else 0
    for depth, part in enumerate(parts):
        yield Moment("forward", steady, kept + part.forward, bucket + _gathered(job, parts, depth, fetching=True))
        kept += part.kept
    later = 0
    for depth, part in reversed([*enumerate(parts)]):
        kept -= part.kept
        held, buffers = _while_reducing(job, later)
        new = job.stage == 0 and not steady
        working = part.backward_with_gradients if new else part.backward
        gathered = _gathered(job, parts, depth, fetching=False)
        yield Moment("backward", max(steady, held), kept + working, bucket + buffers + gathered)
        later += part.gradients // job.dtype.itemsize
    held, buffers = _while_reducing(job, later)
    gathered = _gathered(job, parts, -1, fetching=False)
    yield Moment("reduction", max(steady, held), kept, bucket + buffers + gathered + _reduction(job))
    updated = whole if job.stage in (0, 3) or always else FP32 * partition(job)
    yield Moment("update", updated, kept, bucket + gathered + _flat(job))
    if job.stage in (1, 2):  # gradients that do not stay have been given back
        yield Moment("update", whole if always else 0, kept, _exchanged_weights(job))


def _gathered(job: Job, parts: list[Part], depth: int, *, fetching: bool) -> int:
    """Bytes of parameters that are gathered under ZeRO 3 while the part at `depth` runs; one rank has all of them.

    What the forward pass gathers is kept for the backward pass where that is nearer than the reuse distance, which most
    networks are whole. While it is gathered it lies there twice: as the ranks sent it, and cut into parameters.
    """
    if job.stage < 3 or (job.layout.ranks == 1 and not offloads_parameters(job)):
        return 0
    zero, size = job.deepspeed.zero_optimization, job.dtype.itemsize
    threshold = _set(zero.stage3_param_persistence_threshold, _PERSISTENT)
    bucket = _set(zero.stage3_prefetch_bucket_size, _PREFETCH)
    small = sum(value for group in optimized(job).groups for value in group if value <= threshold)
    values = [part.gradients // size for part in parts]
    if depth < 0:
        return size * small
    near = max(values[depth], _set(zero.stage3_max_reuse_distance, _REUSE) // 2)
    kept = min(sum(values[: depth + 1]), near)
    ahead = min(sum(values[depth + 1 :]), bucket) + values[depth] if fetching else 0
    sent = min(sum(values[: depth + 1] if fetching else values), bucket)  # the last bucket, cut already
    return size * (small + kept + ahead + sent)


def _while_reducing(job: Job, values: int) -> tuple[int, int]:
    """Bytes of gradients, and of the bucket they pass through, once so many values have their gradients."""
    if job.stage == 3 or flat_gradients(job):
        return 0, 0
    if job.stage < 2:
        return FP32 * values, 0 if job.stage == 0 or job.device == "cpu" else _bucket(job, 0)
    full = _bucket_values(job)
    # The first full bucket allocates the rank's part, of all gradients.
    return FP32 * partition(job) if values > full else 0, _bucket(job, min(values, full))


def _reduction(job: Job) -> int:
    """Bytes that the exchange of gradients adds at the end of the backward pass."""
    found = optimized(job)
    values, full = found.values, _bucket_values(job)
    filled, part = min(values, full), FP32 * partition(job)
    if job.stage == 0:
        return FP32 * min(values, _REDUCE_WITHOUT_ZERO)  # all of it flat
    if flat_gradients(job) and not held_once(job):
        return FP32 * (padded(job) if padded(job) <= _REDUCE_WITHOUT_ZERO and len(found.groups) > 1 else 0)
    exchanged = FP32 * filled if job.dtype is not torch.float32 else 0  # half-precision gradients as fp32
    if job.stage == 1 and held_once(job):
        return FP32 * _joined(job) if job.layout.ranks > 1 else 0
    if job.stage == 1:
        return max(_bucket(job, filled), part) - (0 if job.device == "cpu" else _bucket(job, 0))
    if job.stage == 2:  # the rank's part is there since the first of several backward passes, or the first full bucket
        return exchanged + (0 if values > full or job.layout.accumulation > 1 else part)
    # What is sent, in the order of the ranks; on CPUs torch reduces a copy of it.
    return exchanged + FP32 * filled * (2 if job.device == "cpu" else 1)


def _joined(job: Job) -> int:
    """Values of the largest bucket that holds gradients of several groups, which are joined to be exchanged."""
    found, full = optimized(job), _bucket_values(job)
    filled, largest, groups = 0, 0, set[int]()
    for number, group in enumerate(found.groups):
        for value in group if found.trained[number] else ():
            if filled and filled + value > full:
                filled, groups = 0, set()
            filled += value
            groups.add(number)
            largest = max(largest, filled if len(groups) > 1 else 0)
    return largest


def _flat(job: Job) -> int:
    """Bytes of the gradients' flat copy, one group of parameters at a time, or of a tensor in the norm's type."""
    if job.stage == 0 or (flat_gradients(job) and not held_once(job)):
        return 0
    groups, ranks = optimized(job).groups, job.layout.ranks
    norm = _NORM * min(max(max(group) for group in groups), max(ceil(sum(group) / ranks) for group in groups))
    flat_already = job.stage < 3 and (held_once(job) or job.dtype is not torch.float32)
    return norm if flat_already else max(norm, FP32 * max(ceil(sum(group) / ranks) for group in groups))


def _exchanged_weights(job: Job) -> int:
    """Bytes that the exchange of updated weights adds: on CPUs torch gathers each group of them in a copy."""
    if job.device != "cpu" or job.layout.ranks == 1:
        return 0
    return job.dtype.itemsize * max(map(sum, optimized(job).groups))


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
