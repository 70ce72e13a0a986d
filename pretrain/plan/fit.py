"""What of a job fits its machines: the lowest ZeRO stage, the largest micro-batch, and what each change would give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pretrain.engine.layout import Layout
from pretrain.engine.section import OffloadSection
from pretrain.plan.job import Cluster, Job
from pretrain.plan.memory.rank import RankMemory, rank_memory

STAGES = (0, 1, 2, 3)
# Bytes that a process holds once it has imported torch and DeepSpeed: part of a CPU rank's memory, not of a device's.
IMPORTS = 512 << 20
_CPU = OffloadSection(device="cpu")


@dataclass(frozen=True)
class Change:
    """A job that differs from another in some keys."""

    keys: tuple[str, ...]  # key=value, as overrides
    job: Job


@dataclass(frozen=True)
class Fit:
    """How a job goes into the memory of its machines."""

    fits: bool
    job: Job  # the one that is planned: at the lowest stage that fits; the given one where nothing fits
    memory: RankMemory  # of it
    room: int  # bytes that a rank may take
    needs: dict[
        int, int
    ]  # ZeRO stage → bytes of a rank with the job's micro-batch; not of stages that precision rules out
    largest: int | None  # micro-batch at the planned job's stage; None: not even one image
    why: str  # this stage and no other
    remedies: tuple[tuple[str, ...], ...]  # where nothing fits: changes that would, each a set of key=value


def room(job: Job, cluster: Cluster) -> int:
    """Bytes that a rank may take: of a device all; ranks on CPUs share their host's memory."""
    return cluster.device_memory // (cluster.devices if job.device == "cpu" else 1)


def taken(job: Job, memory: RankMemory | None = None) -> int:
    """Bytes of a rank at the peak of a step, at worst; on a CPU with what its process takes before."""
    found = memory or rank_memory(job)
    return found.total + (IMPORTS if job.device == "cpu" else 0)


def fit(job: Job, cluster: Cluster, *, free_micro_batch: bool) -> Fit:
    """The lowest ZeRO stage at which `job` fits.

    Args:
        free_micro_batch: whether the config leaves the micro-batch open: the largest that fits is taken.
    """
    limit = room(job, cluster)
    if free_micro_batch:
        job = with_micro_batch(job, 1)
    staged = {stage: other for stage in STAGES if (other := with_stage(job, stage)) is not None}
    needs = {stage: taken(other) for stage, other in staged.items()}
    for stage, other in staged.items():
        if needs[stage] <= limit:
            largest = largest_micro_batch(other, limit)
            chosen = with_micro_batch(other, largest) if free_micro_batch and largest else other
            return Fit(True, chosen, rank_memory(chosen), limit, needs, largest, _why(chosen, needs, limit), ())
    why = f"no ZeRO stage fits {_images(job.layout.micro_batch)} at a time"
    found = tuple(change.keys for change in remedies(job, limit))
    return Fit(False, job, rank_memory(job), limit, needs, largest_micro_batch(job, limit), why, found)


def refusal(job: Job, cluster: Cluster) -> str | None:
    """Why `job` cannot run on `cluster`, and what could; None where it can, or may.

    What fragments and what is beyond torch differ from machine to machine, so a run is refused only if it would not
    fit without them.
    """
    limit, memory = room(job, cluster), rank_memory(job)
    least = memory.allocated + (IMPORTS if job.device == "cpu" else 0)
    if least <= limit:
        return None
    where = "a device has" if job.device == "cuda" else f"the host has, shared by its {cluster.devices} ranks,"
    parts = ", ".join(f"{name} {gib_text(size)}" for name, size in largest_parts(memory))
    found = [" ".join(change.keys) for change in remedies(job, limit)]
    would = "; what would fit: " + ", or ".join(found) if found else "; no change of one key or two would fit"
    return (
        f"memory: a rank needs {gib_text(least)} at the peak of a step (in {memory.peak}: {parts}), but {where} "
        f"{gib_text(cluster.device_memory)}{would}"
    )


def largest_parts(memory: RankMemory, count: int = 3) -> list[tuple[str, int]]:
    """The parts of a rank's memory that take most, by name."""
    names = ("parameters", "gradients", "optimizer", "average", "activations", "buffers")
    parts = [(name, int(getattr(memory, name))) for name in names]
    return sorted((part for part in parts if part[1]), key=lambda part: -part[1])[:count]


def remedies(job: Job, limit: int, most: int = 3) -> list[Change]:
    """Changes that make `job` fit, the least first: one key, then two, then three. At most `most`."""
    found = [change for change in _single(job, limit) if taken(change.job) <= limit]
    if not found:
        found = [change for change in _combined(job, limit) if taken(change.job) <= limit]
    return found[:most]


def knobs(job: Job) -> Iterator[Change]:
    """What people turn when memory is short or to spare, one key at a time, and both kinds of offload."""
    for kind in ("none", "selective", "full"):
        if kind != job.checkpointing:
            yield with_checkpointing(job, kind)
    for micro in (job.layout.micro_batch // 2, job.layout.micro_batch * 2):
        if micro and job.layout.per_rank % micro == 0:
            yield Change((f"train.micro_batch={micro}",), with_micro_batch(job, micro))
    for stage in STAGES:
        other = with_stage(job, stage)
        if other is not None and stage != job.stage:
            yield Change((f"deepspeed.zero_optimization.stage={stage}",), other)
    yield from _offloads(job)
    yield Change((f"train.compile={str(not job.compiled).lower()}",), replace(job, compiled=not job.compiled))


def with_stage(job: Job, stage: int) -> Job | None:
    """`job` under another ZeRO stage; None where its precision or offload rules that out."""
    zero = job.deepspeed.zero_optimization
    offloads = [one is not None and one.device == "cpu" for one in (zero.offload_optimizer, zero.offload_param)]
    if stage == 0 and (job.dtype is not torch.float32 or any(offloads)):
        return None  # half precision keeps its fp32 weights in ZeRO's partitions
    if stage < 3 and offloads[1]:
        return None
    return _with_zero(job, stage=stage)


def with_micro_batch(job: Job, micro_batch: int) -> Job:
    """`job` with another micro-batch, which divides the images of a rank."""
    layout = job.layout
    return replace(job, layout=Layout(layout.global_batch, micro_batch, layout.per_rank // micro_batch, layout.ranks))


def with_checkpointing(job: Job, kind: Any) -> Change:
    """`job` with another `train.activation_checkpointing`."""
    return Change((f"train.activation_checkpointing={kind}",), replace(job, checkpointing=kind))


def largest_micro_batch(job: Job, limit: int) -> int | None:
    """The largest micro-batch with which a rank takes at most `limit` bytes; None: not even one image fits."""
    images = job.layout.per_rank
    divisors = [number for number in range(1, images + 1) if images % number == 0]
    low, high = 0, len(divisors)  # those below `low` fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        if taken(with_micro_batch(job, divisors[middle])) <= limit:
            low = middle + 1
        else:
            high = middle
    return divisors[low - 1] if low else None


def _single(job: Job, limit: int) -> Iterator[Change]:
    if (micro := largest_micro_batch(job, limit)) is not None:
        yield Change((f"train.micro_batch={micro}",), with_micro_batch(job, micro))
    yield from _higher_stages(job)
    if job.checkpointing != "full":
        if job.checkpointing == "none":
            yield with_checkpointing(job, "selective")
        yield with_checkpointing(job, "full")
    yield from _offloads(job)


def _combined(job: Job, limit: int) -> Iterator[Change]:
    """Two or three of the single changes together; the micro-batch last, as large as then fits."""
    full = with_checkpointing(job, "full") if job.checkpointing != "full" else Change((), job)
    for stage in _higher_stages(job):
        yield _smaller(stage, limit)
        yield _smaller(_both(full, stage), limit)
    yield _smaller(full, limit)
    for offload in _offloads(job):
        yield _smaller(offload, limit)
        if full.keys:
            offloaded = next((one for one in _offloads(full.job) if one.keys == offload.keys), None)
            if offloaded is not None:
                yield _smaller(Change((*full.keys, *offloaded.keys), offloaded.job), limit)


def _smaller(change: Change, limit: int) -> Change:
    """`change`, with a micro-batch that fits where its own does not and one does."""
    if taken(change.job) <= limit or (micro := largest_micro_batch(change.job, limit)) is None:
        return change
    return Change((*change.keys, f"train.micro_batch={micro}"), with_micro_batch(change.job, micro))


def _both(first: Change, second: Change) -> Change:
    """The changes of `first` to what a stage's change has made."""
    return Change((*second.keys, *first.keys), replace(second.job, checkpointing=first.job.checkpointing))


def _higher_stages(job: Job) -> Iterator[Change]:
    for stage in STAGES:
        other = with_stage(job, stage)
        if other is not None and stage > job.stage and job.layout.ranks > 1:
            yield Change((f"deepspeed.zero_optimization.stage={stage}",), other)


def _offloads(job: Job) -> Iterator[Change]:
    """Offload of the optimizer from stage 1 on, and of the parameters too at stage 3; nothing to gain on a CPU."""
    zero = job.deepspeed.zero_optimization
    if job.device == "cpu" or (zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu"):
        return
    stage = max(job.stage, 1)
    said = () if job.stage else ("deepspeed.zero_optimization.stage=1",)
    offload = 'deepspeed.zero_optimization.offload_{}={{"device":"cpu"}}'.format
    yield Change((*said, offload("optimizer")), _with_zero(job, stage=stage, offload_optimizer=_CPU))
    said = () if job.stage == 3 else ("deepspeed.zero_optimization.stage=3",)
    both = (*said, offload("optimizer"), offload("param"))
    yield Change(both, _with_zero(job, stage=3, offload_optimizer=_CPU, offload_param=_CPU))


def _with_zero(job: Job, **changed: Any) -> Job:
    zero = job.deepspeed.zero_optimization.model_copy(update=changed)
    return replace(job, deepspeed=job.deepspeed.model_copy(update={"zero_optimization": zero}))


def _why(job: Job, needs: dict[int, int], limit: int) -> str:
    """Why `job` has its stage: what the one below needs."""
    below = [stage for stage in needs if stage < job.stage]
    if below:
        needed = gib_text(needs[max(below)])
        return f"stage {max(below)} would need {needed}, and {gib_text(limit)} are there"
    if job.stage == 0:
        return "the lowest stage: nothing is partitioned, and least is sent"
    if _offloaded(job):
        return "the lowest stage with what is offloaded"
    return "the lowest stage in half precision, whose fp32 weights lie in ZeRO's partitions"


def _images(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"


def _offloaded(job: Job) -> bool:
    zero = job.deepspeed.zero_optimization
    return any(one is not None and one.device == "cpu" for one in (zero.offload_optimizer, zero.offload_param))


def overrides(changes: Iterable[str]) -> str:
    """Changes as words of a command line."""
    return " ".join(f"'{change}'" if "{" in change else change for change in changes)


def gib_text(size: float) -> str:
    """Bytes in the unit of --gpu-memory: 23.3 GiB."""
    return f"{size / 2**30:.1f} GiB"
