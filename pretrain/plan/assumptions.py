"""What a plan is made from: a config, the machines and options of a command line, and what is assumed for the rest."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import psutil
import torch

from pretrain.engine.layout import Layout, batch_layout
from pretrain.errors import InputError
from pretrain.plan.hardware import CPU, GPUS, Hardware, hardware, has_bf16, usual_gpu
from pretrain.plan.job import Cluster, Job
from pretrain.plan.peak import device_name, listed
from pretrain.plan.plan import Assumed
from pretrain.plan.reading import DECODE_MS, STORAGE, data_set, run_steps
from pretrain.plan.seconds import Pace, assumed_mfu, compiled_gain

if TYPE_CHECKING:
    from pretrain.plan.calibration import Calibration
    from pretrain.training.config import RunConfig

GIB = 1 << 30


@dataclass(frozen=True)
class Given:
    """Options of `launch/plan.py`. None: not given, a default holds."""

    nodes: int
    gpus_per_node: int
    gpu_memory: float  # GiB
    measure: bool = False
    device: Literal["cpu", "cuda"] | None = None
    gpu: str | None = None
    mfu: float | None = None
    tflops: float | None = None
    bandwidth_within: float | None = None  # GB/s
    bandwidth_between: float | None = None  # GB/s
    samples: int | None = None
    image_bytes: float | None = None
    decode_ms: float | None = None
    storage: float | None = None  # GB/s
    price_per_gpu_hour: float | None = None


def cluster_of(given: Given, dtype: torch.dtype) -> tuple[Cluster, Hardware]:
    """The machines, and what they are made of."""
    memory = round(given.gpu_memory * GIB)
    if given.device == "cpu":
        peak = given.tflops * 1e12 if given.tflops else None
        return Cluster(given.nodes, given.gpus_per_node, memory, peak, "cpu"), _linked(CPU, given)
    kind = _linked(hardware(given.gpu or usual_gpu(given.gpu_memory)), given)
    peak = given.tflops * 1e12 if given.tflops else listed(kind.driver_name, dtype)
    return Cluster(given.nodes, given.gpus_per_node, memory, peak, kind.driver_name), kind


def precision_of(config: RunConfig, given: Given) -> torch.dtype:
    """The type that the network computes in on these machines, as the engine would choose it.

    Raises:
        InputError: they do not have it.
    """
    bf16, fp16 = config.deepspeed.bf16.enabled, config.deepspeed.fp16.enabled
    on_cpu = given.device == "cpu"
    gpu = given.gpu or usual_gpu(given.gpu_memory)
    has = on_cpu or has_bf16(gpu)
    if bf16 == "auto":
        bf16 = not on_cpu and has
    if bf16 and not has:
        raise InputError(f"deepspeed.bf16.enabled: {gpu} has no bf16; set deepspeed.fp16.enabled, or neither for fp32")
    if fp16 and on_cpu:
        raise InputError("deepspeed.fp16.enabled: CPUs have no fp16; set deepspeed.bf16.enabled, or neither for fp32")
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def assume(config: RunConfig, given: Given) -> tuple[Job, Cluster, Assumed]:
    """What is planned, on which machines, and on what assumptions.

    Raises:
        InputError: config and machines do not go together, or the run's length is not known.
    """
    said: list[str] = []
    if given.device is None:
        on_gpu = torch.cuda.is_available() if given.measure else True
        given = replace(given, device="cuda" if on_gpu else "cpu")
        if given.measure:
            said.append(f"--device {given.device}, the device at hand")
    if given.device == "cuda" and given.gpu is None:
        given = replace(given, gpu=_gpu_at_hand(given))
        said.append(f"--gpu {given.gpu}" + ("" if given.measure else f", by its {given.gpu_memory:g} GiB"))
    dtype = precision_of(config, given)
    cluster, kind = cluster_of(given, dtype)
    train = config.train
    layout = _layout(train.global_batch, train.micro_batch, cluster.ranks, said)
    assert given.device is not None
    job = config.job(layout, dtype, device=given.device, steps=None)
    data = data_set(job, config.model.num_classes, given.samples, given.image_bytes)
    job = replace(job, steps=run_steps(train.steps, train.epochs, train.global_batch, data.samples))
    measured = _calibration(job, given, said) if given.measure else None
    pace = _measured_pace(job, measured, kind) if measured else _assumed_pace(job, given, cluster, kind, said)
    if pace is not None and cluster.ranks > 1:
        within, between = pace.fabric.within / 1e9, pace.fabric.between / 1e9
        said.append(
            f"{within:.3g} GB/s from a device to those of its node (--bandwidth-within), {between:.3g} GB/s from a "
            "node to the others (--bandwidth-between)"
        )
    decode = given.decode_ms or (measured.decode_ms if measured else DECODE_MS)
    if measured is None and given.decode_ms is None:
        said.append(f"{DECODE_MS:g} ms of a decode thread for an image of 500×375 (--decode-ms, --measure)")
    storage = STORAGE if given.storage is None else given.storage * 1e9
    if given.storage is None:
        said.append(f"{STORAGE / 1e9:g} GB/s to the run folder's storage, from all ranks together (--storage)")
    said += data.said
    cores = (os.cpu_count() or 1) / given.gpus_per_node if given.device == "cpu" else None
    return job, cluster, Assumed(pace, data, decode, storage, cores, given.price_per_gpu_hour, tuple(said))


def _layout(global_batch: int, micro_batch: int | None, ranks: int, said: list[str]) -> Layout:
    """How the batch is divided; by the next smaller micro-batch where that of the config is not possible on so many
    ranks.
    """
    images = global_batch // ranks
    if micro_batch is not None and images and global_batch % ranks == 0 and images % micro_batch:
        possible = max(size for size in range(1, min(micro_batch, images) + 1) if images % size == 0)
        said.append(
            f"train.micro_batch={possible}, as {micro_batch} does not divide a rank's {images} images of a step"
        )
        micro_batch = possible
    return batch_layout(global_batch, micro_batch, ranks)


def _gpu_at_hand(given: Given) -> str:
    """The GPU of this machine where it is measured and listed; else the usual one with so much memory."""
    if given.measure and torch.cuda.is_available():
        name = device_name(torch.device("cuda"))
        return next((gpu for gpu in GPUS if hardware(gpu).driver_name == name), usual_gpu(given.gpu_memory))
    return usual_gpu(given.gpu_memory)


def _linked(kind: Hardware, given: Given) -> Hardware:
    """`kind` with the bandwidths that are given, as reached, in place of its own."""
    fabric = kind.fabric
    if given.bandwidth_within is not None:
        fabric = replace(fabric, within=given.bandwidth_within * 1e9)
    if given.bandwidth_between is not None:
        fabric = replace(fabric, between=given.bandwidth_between * 1e9)
    return replace(kind, fabric=fabric)


def _assumed_pace(job: Job, given: Given, cluster: Cluster, kind: Hardware, said: list[str]) -> Pace | None:
    """The pace by the data sheet and a share of it that is reached; None where there is no data sheet."""
    if cluster.peak_flops is None:
        said.append(
            f"no times: the peak of {cluster.device_name} in {str(job.dtype).removeprefix('torch.')} is not known; "
            "--measure on such a device, or --tflops, would say"
        )
        return None
    mfu = given.mfu or assumed_mfu(job)
    peak = f"{cluster.peak_flops / 1e12:.4g} TFLOP/s"
    said.append(f"{100 * mfu:.0f} % of {peak} in forward and backward passes (--mfu, --tflops, --measure)")
    if job.compiled:
        said.append(f"compiled, {compiled_gain(job):.2f} times as fast as that")
    return Pace(mfu * cluster.peak_flops, kind.memory_bandwidth, kind.host_link, kind.fabric)


def _calibration(job: Job, given: Given, said: list[str]) -> Calibration:
    from pretrain.plan.calibration import calibrate  # here, as it imports what takes a second

    device = torch.device(job.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--measure --device cuda: this machine has no such device; measure on one that has, or on cpu")
    free = given.gpu_memory * GIB
    if device.type == "cpu":
        free = min(free, psutil.virtual_memory().available) / given.gpus_per_node
    found = calibrate(job, given.gpus_per_node, device, int(0.8 * free))
    said.append(f"measured on this {device_name(device)}: {found.said}: {found.flops / 1e12:.3g} TFLOP/s")
    said.append(
        f"measured: updates move {found.memory_bandwidth / 1e9:.3g} GB/s; a thread decodes {found.decoded} in "
        f"{found.decode_ms:.2g} ms"
    )
    return found


def _measured_pace(job: Job, found: Calibration, kind: Hardware) -> Pace:
    fabric = kind.fabric
    if found.all_reduce is not None:
        fabric = replace(fabric, within=found.all_reduce)
    return Pace(found.flops / compiled_gain(job), found.memory_bandwidth, kind.host_link, fabric)
