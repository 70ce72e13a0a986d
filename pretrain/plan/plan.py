"""A run's plan: memory, time, traffic, data, checkpoints and money on given machines, as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pretrain.page.text import Table, bytes_text, duration_text, number_text
from pretrain.plan.fit import Fit, fit, gib_text, knobs, overrides, taken
from pretrain.plan.flops import training_flops
from pretrain.plan.job import Cluster, Job
from pretrain.plan.memory.host import HostMemory, host_memory
from pretrain.plan.memory.states import optimized
from pretrain.plan.reading import (
    LAUNCHER_GRACE,
    SLURM_NOTICE,
    DataSet,
    Reading,
    Stop,
    checkpoint_bytes,
    reading,
)
from pretrain.plan.seconds import Pace, StepTime, step_time

GIB = 1 << 30


@dataclass(frozen=True)
class Assumed:
    """What a plan rests on besides job and machines. Each has a default that the plan names, or was measured."""

    pace: Pace | None  # None: not known, so that no times follow
    data: DataSet
    decode_ms: float  # of a decode thread, for an image
    storage: float  # bytes/s that the run folder's file system takes
    cores: float | None = None  # of a CPU that a rank shares between training and decoding; None on a device
    price: float | None = None  # of a GPU hour
    said: tuple[str, ...] = ()  # the assumptions in words, with the options that change them


@dataclass(frozen=True)
class Plan:
    """What a run costs on a cluster. Times are None where the pace of its devices is not known."""

    job: Job  # as planned
    cluster: Cluster
    fit: Fit
    parameters: int
    time: StepTime | None
    reading: Reading | None
    checkpoint: int  # bytes
    stop: Stop | None
    assumed: Assumed
    host: HostMemory  # of a machine
    overrides: tuple[str, ...]  # what the run must be told beyond its config to be as planned
    # What a change gives: its keys, bytes of a rank, step time as a multiple of the plan's.
    table: tuple[tuple[tuple[str, ...], int, float | None], ...]

    @property
    def hours(self) -> float | None:
        """Of the whole run, without evaluations, saves and starts."""
        if self.time is None or self.job.steps is None:
            return None
        return self.job.steps * self.time.total / 3600

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all devices together."""
        return None if self.hours is None else self.hours * self.cluster.ranks

    @property
    def money(self) -> float | None:
        """In the price's currency; None without a price."""
        price = self.assumed.price
        return None if price is None or self.gpu_hours is None else price * self.gpu_hours

    def json(self) -> dict[str, Any]:
        """The plan for scripts: docs/planning.md says what each key is."""
        memory, time, read = self.fit.memory, self.time, self.reading
        return {
            "parameters": self.parameters,
            "flops_per_image": training_flops(self.job.spec, self.job.frozen),
            "fits": self.fit.fits,
            "zero_stage": self.job.stage,
            "micro_batch": self.job.layout.micro_batch,
            "per_rank_bytes": {
                "parameters": memory.parameters,
                "gradients": memory.gradients,
                "optimizer": memory.optimizer,
                "average": memory.average,
                "activations": memory.activations,
                "buffers": memory.buffers,
                "on_host": memory.on_host,
                "absent": memory.absent,
                "outside": memory.outside,
                "fragmentation": list(memory.fragmentation),
                "total": taken(self.job, memory),
            },
            "step_seconds": time and time.total,
            "run_hours": self.hours,
            "loader_cores": read and read.cores,
            "read_bytes_per_second": read and read.bytes_per_second,
            "requests_per_second": read and read.requests_per_second,
            "checkpoint_bytes": self.checkpoint,
            "host_bytes": {**asdict(self.host), "total": self.host.total},
            "room_bytes": self.fit.room,
            "largest_micro_batch": self.fit.largest,
            "why": self.fit.why,
            "overrides": list(self.overrides),
            "would_fit": [list(keys) for keys in self.fit.remedies],
            "steps": self.job.steps,
            "images_per_second": read and read.images_per_second,
            "seconds": time
            and {
                "compute": time.compute,
                "recomputed": time.again,
                "communication": time.traffic.seconds,
                "exposed_communication": time.exposed,
                "update": time.update,
                "data": time.data,
            },
            "sent_bytes_per_rank": time and time.traffic.sent,
            "save_seconds": self.stop and self.stop.save,
            "grace_seconds": self.stop and self.stop.grace,
            "gpu_hours": self.gpu_hours,
            "money": self.money,
            "knobs": [{"change": list(keys), "bytes": size, "step_ratio": ratio} for keys, size, ratio in self.table],
            "assumptions": list(self.assumed.said),
        }

    def text(self) -> str:
        """The plan for people, below a line that says on which machines."""
        return "\n".join(_lines(self))


def machines_text(job: Job, cluster: Cluster) -> str:
    """The machines for people: 8 × 8 NVIDIA H100 80GB HBM3, 80.0 GiB each."""
    kind = "CPU ranks" if job.device == "cpu" else cluster.device_name or "GPUs"
    of = "a host" if job.device == "cpu" else "each"
    return f"{cluster.nodes} × {cluster.devices} {kind}, {gib_text(cluster.device_memory)} {of}"


def make_plan(job: Job, cluster: Cluster, assumed: Assumed, micro_batch: int | None) -> Plan:
    """The plan of `job` on `cluster`.

    Args:
        micro_batch: what the config says; None: the largest that fits is taken.
    """
    parameters = optimized(job).values
    found = fit(job, cluster, free_micro_batch=micro_batch is None)
    chosen = found.job
    time = _time(chosen, cluster, parameters, assumed)
    saved = checkpoint_bytes(chosen, parameters)
    table = []
    for change in knobs(chosen):
        other = _time(change.job, cluster, parameters, assumed)
        table.append((change.keys, taken(change.job), other.total / time.total if other and time else None))
    return Plan(
        chosen,
        cluster,
        found,
        parameters,
        time,
        reading(chosen, time.total, assumed.data, assumed.decode_ms) if time else None,
        saved,
        Stop(time.total, saved / assumed.storage) if time else None,
        assumed,
        host_memory(chosen, cluster),
        _overrides(job, chosen, micro_batch),
        tuple(table),
    )


def _overrides(job: Job, chosen: Job, micro_batch: int | None) -> tuple[str, ...]:
    """What tells a config of stage `job.stage` and `micro_batch` to run as `chosen`."""
    found = []
    if chosen.stage != job.stage:
        found.append(f"deepspeed.zero_optimization.stage={chosen.stage}")
    if chosen.layout.micro_batch != (micro_batch or job.layout.per_rank):
        found.append(f"train.micro_batch={chosen.layout.micro_batch}")
    return tuple(found)


def _time(job: Job, cluster: Cluster, parameters: int, assumed: Assumed) -> StepTime | None:
    """A step's time, with what the images add: decode threads run beside a device, but on a CPU's own cores."""
    if assumed.pace is None:
        return None
    time = step_time(job, cluster, parameters, assumed.pace)
    decoding = job.layout.per_rank * assumed.decode_ms / 1e3  # seconds of one thread
    if assumed.cores is not None:
        return replace(time, data=decoding / assumed.cores)
    return replace(time, data=max(decoding / job.data.workers - time.total, 0.0))


def _lines(plan: Plan) -> Iterator[str]:
    job, found = plan.job, plan.fit
    layout = job.layout
    verdict = f"fits with ZeRO {job.stage}" if found.fits else "DOES NOT FIT"
    yield f"  {verdict}: {found.why}"
    yield f"  {job.spec.describe()}"
    flops = _flops(training_flops(job.spec, job.frozen))
    yield f"  {number_text(plan.parameters / 1e6)} M parameters, {flops} to train on an image"
    dtype = str(job.dtype).removeprefix("torch.")
    largest = f"the largest that fits is {found.largest}" if found.largest else "not even one image fits"
    yield (
        f"  batch {layout.global_batch:,} = {layout.ranks} ranks × {layout.accumulation} accumulation × micro-batch "
        f"{layout.micro_batch} ({largest}); {dtype}"
    )
    if plan.overrides:
        yield f"  to run like this, beyond the config: {overrides(plan.overrides)}"
    for keys in found.remedies:
        yield f"  would fit: {overrides(keys)}"
    if not found.fits and not found.remedies:
        yield "  no change of some keys would fit: more or larger devices, or a smaller network"
    yield ""
    yield from _memory(plan)
    host = plan.host
    yield f"Memory of a host: {gib_text(host.total)}"
    parts = (
        ("processes", host.processes, ""),
        ("read ahead", host.read_ahead, f"data.read_ahead_mib={job.data.read_ahead_mib} a rank"),
        ("batches", host.batches, "decoded images"),
        ("save", host.save_copy, "the copy that is written while training continues"),
        ("offloaded", host.offloaded, "from the devices"),
        ("building", host.building, "in place of read-ahead, batches and save, before training begins"),
        ("ranks", host.devices, "as above"),
    )
    yield from _sizes(parts)
    if plan.time is not None:
        yield ""
        yield from _step(plan, plan.time)
    yield ""
    yield "What a change gives"
    header = ("change", "memory", "fits", "step ÷ now's")
    rows = [
        (_short(keys), gib_text(size), "yes" if size <= found.room else "no", "–" if ratio is None else f"{ratio:.2f}")
        for keys, size, ratio in plan.table
    ]
    yield from _indented(Table(header, rows).text())
    yield ""
    yield from _run(plan)
    yield ""
    yield "Assumed"
    yield from (f"  {one}" for one in plan.assumed.said)


def _short(keys: tuple[str, ...]) -> str:
    """Changes without what is the same in all of them."""
    return ", ".join(key.rpartition(".")[2].replace('={"device":"cpu"}', "=cpu") for key in keys)


def _memory(plan: Plan) -> Iterator[str]:
    memory, total = plan.fit.memory, taken(plan.job, plan.fit.memory)
    yield f"Memory of a rank: {gib_text(total)} of {gib_text(plan.fit.room)}, at the peak, in {memory.peak}"
    rows = [
        ("parameters", memory.parameters, "that the network computes with"),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, "fp32 weights, moments"),
        ("average", memory.average, ""),
        ("activations", memory.activations, "of a micro-batch"),
        ("buffers", memory.buffers, "DeepSpeed's buckets, copies, gathered parameters"),
        ("on the host", -memory.on_host, "offloaded"),
        ("not at the peak", -memory.absent, "of the gradients"),
        ("outside torch", memory.outside, "context, communication, libraries"),
        ("fragmentation", memory.fragmentation[1], f"at most; at least {gib_text(memory.fragmentation[0])}"),
        ("the process", total - memory.total, "with its imports, before it trains"),
    ]
    yield from _sizes(rows)


def _sizes(rows: Iterable[tuple[str, int, str]]) -> Iterator[str]:
    for name, size, what in rows:
        if size:
            yield f"  {name:16}{gib_text(size):>11}  {what}".rstrip()


def _step(plan: Plan, time: StepTime) -> Iterator[str]:
    images = plan.job.layout.global_batch
    yield f"Step: {_seconds(time.total)}, {number_text(images / time.total)} images/s"
    rows = [
        ("forward and backward", time.compute, f"{_seconds(time.again)} of it computed again" if time.again else ""),
        ("communication", time.exposed, _communication(time)),
        ("update", time.update, ""),
        ("data", time.data, _data(plan)),
    ]
    for name, seconds, what in rows:
        if seconds:
            yield f"  {name:21}{_seconds(seconds):>10}  {what}".rstrip()


def _data(plan: Plan) -> str:
    if plan.assumed.cores is not None:
        return "images are decoded on the same cores"
    return f"what data.workers={plan.job.data.workers} decode more slowly than a step"


def _communication(time: StepTime) -> str:
    hidden = time.traffic.seconds - time.exposed
    said = f"each rank sends {bytes_text(time.traffic.sent)}"
    return f"{said}; {_seconds(hidden)} more are hidden" if hidden > 1e-4 else said


def _run(plan: Plan) -> Iterator[str]:
    job, read, stop = plan.job, plan.reading, plan.stop
    if plan.hours is not None and plan.gpu_hours is not None:
        money = "" if plan.money is None else f", {plan.money:,.0f} at {plan.assumed.price:g} an hour"
        length = duration_text(plan.hours * 3600)
        yield f"Run: {job.steps:,} steps, {length}, {number_text(plan.gpu_hours)} GPU-hours{money}"
    if read is not None:
        ranks = plan.cluster.ranks
        yield (
            f"Data: {number_text(read.images_per_second)} images/s need {number_text(read.cores)} cores to decode, "
            f"{number_text(read.cores / ranks)} a rank (data.workers={job.data.workers}); "
            f"{bytes_text(read.bytes_per_second)}/s and {number_text(read.requests_per_second)} requests/s of storage"
        )
    save = "" if stop is None else f", saved in {_seconds(stop.save)}"
    yield f"Checkpoint: {bytes_text(plan.checkpoint)}{save}; {job.checkpoint.keep} are kept, and one is being written"
    if stop is not None:
        yield (
            f"Stop: {_seconds(stop.grace)} from the signal to the end: the step under way, {_seconds(stop.step)}, and "
            f"the save; {_grace(stop.grace)}"
        )


def _grace(seconds: float) -> str:
    if seconds <= LAUNCHER_GRACE:
        return f"within the {LAUNCHER_GRACE:g} s that DeepSpeed's launcher and scancel give"
    stop = f"more than the {LAUNCHER_GRACE:g} s that DeepSpeed's launcher and scancel give: stop by the file STOP"
    if seconds <= SLURM_NOTICE:
        return f"{stop}; within the {SLURM_NOTICE:g} s of --signal in launch/slurm.sbatch"
    return f"{stop}; --signal=USR1@{round(1.5 * seconds)} in launch/slurm.sbatch, which has {SLURM_NOTICE:g}"


def _indented(lines: list[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)


def _flops(count: float) -> str:
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e12 else f"{count / 1e9:.3g} GFLOP"


def _seconds(value: float) -> str:
    if value >= 60:
        return duration_text(value)
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"
