"""A run against its plan: refused where it cannot fit its machines; what it takes is compared with what was planned."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch

from pretrain import hostmemory
from pretrain.errors import InputError
from pretrain.page.text import number_text
from pretrain.plan.fit import gib_text, refusal
from pretrain.plan.hardware import GPUS, hardware
from pretrain.plan.job import Cluster, Job
from pretrain.plan.memory.host import host_memory
from pretrain.plan.memory.rank import rank_memory
from pretrain.plan.memory.states import optimized
from pretrain.plan.peak import device_name, peak_flops
from pretrain.plan.seconds import Pace, assumed_mfu, step_time
from pretrain.ranks.collectives import World, all_gather_list, on_main

# A run that roughly needs less than this share of its memory is not planned: tracing it takes half a second.
_NOT_WORTH_IT = 1 / 32


@dataclass(frozen=True)
class Expected:
    """What a rank is planned to take. Bytes are those of `RankMemory`."""

    parameters: int
    optimizer: int
    average: int
    step: int  # that a step adds at its peak: gradients, activations, buffers, libraries; on a CPU its images too
    most: int  # of all, with what fragments and lies outside torch at worst
    step_seconds: float | None  # None: how fast these devices are is not known without `launch/plan.py --measure`
    read_bytes: float  # of a step, from storage, by all ranks

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step."""
        return self.parameters + self.optimizer + self.average + self.step


def expected(job: Job, world: World, sample_bytes: float) -> Expected | None:
    """What a rank of `job` will take on the machines at hand; None: so little that it is not planned. Collective.

    Args:
        sample_bytes: of a sample in its shard.

    Raises:
        InputError: the job cannot fit, and what would; the same on every rank.
    """
    cluster = cluster_here(job, world)

    def plan() -> Expected | None:
        if _roughly(job) < _NOT_WORTH_IT * cluster.device_memory / (cluster.devices if job.device == "cpu" else 1):
            return None
        if refused := refusal(job, cluster):
            raise InputError(refused)
        memory = rank_memory(job)
        states = memory.parameters + memory.optimizer + memory.average - memory.on_host
        added = memory.allocated - states
        if job.device == "cpu":  # where all of a process is measured
            added += memory.outside + host_memory(job, cluster).batches // cluster.devices
        kept = memory.optimizer + memory.average
        optimizer = round(memory.optimizer * (1 - memory.on_host / kept)) if kept else 0
        return Expected(
            memory.parameters,
            optimizer,
            states - memory.parameters - optimizer,
            added,
            states + added + memory.fragmentation[1] + (memory.outside if job.device == "cuda" else 0),
            _step_seconds(job, cluster),
            job.layout.global_batch * sample_bytes,
        )

    return on_main(plan)


def cluster_here(job: Job, world: World) -> Cluster:
    """The machines that the ranks are on; the smallest device and the fullest host count. Collective."""
    found = all_gather_list([(socket.gethostname(), memory_of(world.device))])
    hosts = [host for host, _ in found]
    return Cluster(
        len(set(hosts)),
        max(map(hosts.count, hosts)),
        min(memory for _, memory in found),
        peak_flops(world.device, job.dtype),
        device_name(world.device),
    )


def memory_of(device: torch.device) -> int:
    """Bytes of the device's memory; of a CPU, what this host gives to all its ranks."""
    if device.type == "cpu":
        return hostmemory.total_memory()
    return int(torch.get_device_module(device).mem_get_info(device)[1])


class Meter:
    """The memory that this rank takes of its device, from when the meter is made: before there is a network."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = hostmemory.resident_memory() if device.type == "cpu" else 0

    def restart(self) -> None:
        """Let the peak begin anew: what building a network took does not count as a step's."""
        if self._device.type == "cpu":
            hostmemory.restart_peak()
        else:
            torch.get_device_module(self._device).reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """The most bytes at a time: allocated; of a CPU, of the whole process beyond what it took before."""
        if self._device.type == "cpu":
            return hostmemory.peak_memory() - self._before
        return int(torch.get_device_module(self._device).max_memory_allocated(self._device))

    def reserved(self) -> int | None:
        """The most bytes that torch took from the device at a time; None of a CPU."""
        if self._device.type == "cpu":
            return None
        return int(torch.get_device_module(self._device).max_memory_reserved(self._device))


@dataclass(frozen=True)
class Comparison:
    """A run's memory beside its plan.

    held: bytes of "parameters", "optimizer" and "average" on this rank's device.
    """

    expected: Expected | None
    meter: Meter
    held: dict[str, int]

    def values(self, peak: int, reserved: int | None, step_seconds: float) -> dict[str, float]:
        """What was measured and, as plan/…, what was planned of it, by the names of metrics.jsonl.

        Args:
            peak: bytes, of the rank that took most.
            reserved: the same, of what torch took from the device; None of a CPU.
            step_seconds: of a step, measured.
        """
        found: dict[str, float] = {f"memory/{part}": size for part, size in self.held.items()}
        found |= {"memory/step": peak - sum(self.held.values()), "memory/peak": peak}
        if reserved is not None:
            found["memory/reserved"] = reserved
        found["step_seconds"] = step_seconds
        plan = self.expected
        if plan is not None:
            for part in ("parameters", "optimizer", "average", "step", "peak", "most"):
                found[f"plan/memory/{part}"] = getattr(plan, part)
            if plan.step_seconds is not None:
                found["plan/step_seconds"] = plan.step_seconds
            found["plan/bytes_per_second"] = plan.read_bytes / (plan.step_seconds or step_seconds)
        return found

    def line(self, values: dict[str, float]) -> str:
        """The same for the console."""
        plan, peak = self.expected, gib_text(values["memory/peak"])
        step = f"step {number_text(values['step_seconds'])} s"
        if "memory/reserved" in values:
            peak += f" ({gib_text(values['memory/reserved'])} reserved)"
        if plan is None:
            return f"memory of a rank: {peak}; {step}"
        if plan.step_seconds is not None:
            step += f", planned {number_text(plan.step_seconds)}"
        return f"memory of a rank: {peak}, planned {gib_text(plan.peak)}, at worst {gib_text(plan.most)}; {step}"


def _roughly(job: Job) -> float:
    """Bytes of a rank within a factor of two or so, from sizes alone."""
    spec = job.spec
    values = spec.layers * (4 * spec.width + 2 * spec.mlp) * spec.width + spec.width * spec.num_classes
    tokens = job.layout.micro_batch * (spec.grid**2 + 1)
    return 24 * values + job.dtype.itemsize * spec.layers * tokens * (10 * spec.width + 3 * spec.mlp)


def _step_seconds(job: Job, cluster: Cluster) -> float | None:
    kind = next((found for found in map(hardware, GPUS) if found.driver_name == cluster.device_name), None)
    if kind is None or cluster.peak_flops is None:
        return None
    pace = Pace(assumed_mfu(job) * cluster.peak_flops, kind.memory_bandwidth, kind.host_link, kind.fabric)
    return step_time(job, cluster, optimized(job).values, pace).total
