"""The memory of one rank, by part."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.plan.job import Job


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the peak of a step, by what they hold."""

    parameters: int  # that the network computes with
    gradients: int
    optimizer: int  # fp32 weights, moments
    average: int
    activations: int  # at the peak: kept for the backward pass, and what its largest operation adds
    buffers: int  # DeepSpeed's buckets, flat copies, gathered parameters
    outside: int  # outside torch's allocator: context, communication, libraries' work spaces
    fragmentation: tuple[int, int]  # least and most that the allocator reserves beyond what is allocated

    @property
    def allocated(self) -> int:
        """Bytes that torch allocates at the peak."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.activations + self.buffers

    @property
    def total(self) -> int:
        """Bytes taken from the device at worst: allocated, reserved beyond, outside torch."""
        return self.allocated + self.outside + self.fragmentation[1]


def rank_memory(job: Job) -> RankMemory:
    """The device memory of the rank that needs most."""
    raise NotImplementedError
