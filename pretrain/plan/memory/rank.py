"""The memory of one rank, by part."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.plan.job import Job
from pretrain.plan.memory.activations import parts
from pretrain.plan.memory.buffers import moments
from pretrain.plan.memory.outside import fragmentation, outside
from pretrain.plan.memory.states import states


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by what they hold, and what of it is there at the peak of a step."""

    parameters: int  # that the network computes with
    gradients: int  # held between two backward passes, at the most
    optimizer: int  # fp32 weights where they are not the parameters themselves, moments
    average: int
    activations: int  # at the peak: kept for the backward pass, and what its largest operation adds
    buffers: int  # at the peak: DeepSpeed's buckets, flat copies, gathered parameters
    on_host: int  # of optimizer and average, what is offloaded to the host's memory
    absent: int  # of the gradients, what is not there at the peak: not made yet, or passed on to other ranks
    outside: int  # outside torch's allocator: context, communication, libraries' work spaces
    fragmentation: tuple[int, int]  # least and most that the allocator reserves beyond what is allocated
    peak: str  # where in a step the peak is: "forward", "backward", "reduction" of gradients, "update"

    @property
    def allocated(self) -> int:
        """Bytes that torch allocates on the device at the peak."""
        held = self.parameters + self.gradients + self.optimizer + self.average + self.activations + self.buffers
        return held - self.on_host - self.absent

    @property
    def total(self) -> int:
        """Bytes taken from the device at worst: allocated, reserved beyond, outside torch."""
        return self.allocated + self.outside + self.fragmentation[1]


def rank_memory(job: Job) -> RankMemory:
    """The device memory of the rank that needs most."""
    held = states(job)
    peak = max(moments(job, parts(job)), key=lambda moment: moment.total)
    resting = held.parameters + held.optimizer + held.average - held.on_host
    return RankMemory(
        held.parameters,
        held.gradients,
        held.optimizer,
        held.average,
        peak.activations,
        peak.buffers,
        held.on_host,
        held.gradients - peak.gradients,
        outside(job).total,
        fragmentation(job, resting + peak.total, peak.total),
        peak.name,
    )
