"""The memory of a host: what its ranks keep there beside what their devices hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.plan.job import Cluster, Job
from pretrain.plan.memory.rank import rank_memory
from pretrain.plan.memory.states import FP32, optimized, partition, states

# A rank's process once all is imported: 0.5 GiB with torch for a CPU (`benchmarks/memory.py`); on a host with
# accelerators their driver and libraries come to it: a rough figure, of which a part is shared between ranks.
_PROCESS = {"cpu": 512 << 20, "cuda": 3 << 30}
_BATCHES = 5  # micro-batches that are decoded ahead, in use or on their way to the device


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one host, for all of its ranks together."""

    processes: int  # Python, torch and their libraries
    read_ahead: int  # shards read before they are needed, at the most
    batches: int  # decoded images
    save_copy: int  # the copy of the state that is written while training continues; the first save allocates it
    offloaded: int  # optimizer state that ZeRO keeps here, and the gradients and weights on their way
    building: int  # the network in fp32, whole in each process, before it is on the devices; gone when training begins
    devices: int  # where the host is the device: the memory of its ranks

    @property
    def total(self) -> int:
        """Bytes of all that is there at a time."""
        training = self.read_ahead + self.batches + self.save_copy
        return self.processes + max(training, self.building) + self.offloaded + self.devices


def host_memory(job: Job, cluster: Cluster) -> HostMemory:
    """The memory that each of the cluster's hosts needs."""
    ranks = cluster.devices
    spec, on_host = job.spec, job.device == "cpu"
    pixels = spec.channels * spec.image_size**2 * (FP32 if on_host else 1)
    return HostMemory(
        processes=ranks * _PROCESS[job.device],
        read_ahead=ranks * (job.data.read_ahead_mib << 20),
        batches=ranks * _BATCHES * job.layout.micro_batch * pixels,
        save_copy=ranks * save_copy(job),
        offloaded=ranks * _offloaded(job),
        # In half precision with a copy, from which the exact weights are taken.
        building=0 if on_host else ranks * FP32 * optimized(job).values * (1 if job.dtype is torch.float32 else 2),
        devices=ranks * rank_memory(job).total if on_host else 0,
    )


def _offloaded(job: Job) -> int:
    """Bytes of a rank's state on the host, with fp32 gradients for its update and weights to be sent back."""
    on_host = states(job).on_host
    if not on_host:
        return 0
    gradients = FP32 * partition(job) * (2 if job.stage == 3 else 1)  # ZeRO 3: as summed, and as updated from
    return on_host + gradients + job.dtype.itemsize * partition(job)


def save_copy(job: Job) -> int:
    """Bytes of a rank's copy of what it saves; page-locked on a host with accelerators, in powers of two."""
    found = optimized(job)
    if not job.checkpoint.background or not (job.checkpoint.every or job.checkpoint.every_minutes):
        return 0  # written from the engine's own memory, as the last save of a run always is
    kinds = 1 + found.moments + found.averages
    size = FP32 * -(-found.values // job.layout.ranks)
    return kinds * (size if job.device == "cpu" else 1 << (size - 1).bit_length())
