"""Bytes outside torch's allocator: assumptions with their sources, not traced."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.plan.job import Job

_MIB = 1 << 20
_GIB = 1 << 30

# CUDA: measured on an H100 by the authors of pith-train (`tools/memory_estimator`): the context; NCCL, 0.39, and its
# process groups, 1.00; what the first forward pass adds (work spaces of libraries, kernels loaded late). Theirs is
# another network, so the last figure is rather too large here.
_CONTEXT, _NCCL, _FIRST_PASS = int(0.52 * _GIB), int(1.39 * _GIB), int(2.97 * _GIB)

# CPU: what DeepSpeed's own objects, threads' stacks and gloo's buffers take once all is imported: 2 to 6 MiB measured
# (`benchmarks/memory.py`).
_CPU_PROCESS = 4 * _MIB


@dataclass(frozen=True)
class Outside:
    """Bytes outside torch's allocator, by what they are."""

    context: int  # of the device's driver
    communication: int  # NCCL's or gloo's
    libraries: int  # work spaces and kernels that the first step loads

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.context + self.communication + self.libraries


def outside(job: Job) -> Outside:
    """What lies outside torch's allocator on one rank."""
    if job.device == "cpu":
        return Outside(0, 0, _CPU_PROCESS)
    return Outside(_CONTEXT, _NCCL if job.layout.ranks > 1 else 0, _FIRST_PASS)


def fragmentation(job: Job, allocated: int, varying: int) -> tuple[int, int]:
    """Least and most bytes that the allocator holds beyond what is allocated.

    Args:
        allocated: at the peak.
        varying: of these, what comes and goes within a step, between which gaps arise.
    """
    if job.device == "cpu":
        # glibc keeps freed memory between what is in use: by default a process took 10 to 110 % more of what comes and
        # goes than with each tensor in pages of its own (`benchmarks/memory.py`). Of large tensors it keeps nothing.
        return 0, varying
    # torch rounds up to 2 MiB blocks; pith-train's authors saw 10 % of what is allocated.
    return 0, allocated // 10
