"""How fast the device at hand is: a network of the job's width is trained for some seconds, and images are decoded.

Nothing is written. On CPUs as many processes as the node has ranks work at the same time, as they will in the run.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.index.index import Index
from pretrain.model import arithmetic
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.plan.job import Job
from pretrain.plan.memory.rank import rank_memory
from pretrain.plan.seconds import flops_done, touched_bytes

_SECONDS = 20.0  # that passes may be repeated for
_LEAST, _MOST = 3, 30  # repetitions
_FEW = (1, 3)  # blocks of the two networks that a large one is extrapolated from
_UPDATED = 20_000_000  # values of the tensor whose update is timed, at the most
_REDUCED = 10_000_000  # values of the all-reduce that is timed
_DECODED = 64  # images


@dataclass(frozen=True)
class Calibration:
    """What was measured, as rates of one rank."""

    flops: float  # FLOP/s of forward and backward passes
    memory_bandwidth: float  # bytes/s of the update
    all_reduce: float | None  # bytes/s that a rank sends in an all-reduce; None: of one rank, or not on a CPU
    decode_ms: float
    decoded: str  # what was
    said: str


def calibrate(job: Job, ranks: int, device: torch.device, free: int) -> Calibration:
    """Measure on `device` what a rank of `job` reaches.

    Args:
        ranks: of a node; those on CPUs are measured together.
        free: bytes of memory that a rank may take meanwhile.
    """
    decode, decoded = decode_ms(job)
    if device.type != "cpu" or ranks == 1:
        flops, bandwidth, said = _passes(job, device, free)
        return Calibration(flops, bandwidth, None, decode, decoded, said)
    ranks = min(ranks, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, (ranks, folder, job, free), nprocs=ranks, start_method="spawn")
        found = [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(ranks)]
    flops, bandwidth, reduced = (min(one[part] for one in found) for part in (0, 1, 2))
    return Calibration(flops, bandwidth, reduced, decode, decoded, f"{found[0][3]}, on {ranks} ranks at a time")


def decode_ms(job: Job) -> tuple[float, str]:
    """Milliseconds that one decode thread takes for an image, and of which: the run's own, or one like ImageNet's."""
    if job.data.train is not None:
        return _own_images(job), "an image of data.train"
    return _a_photo(job), "an image of 500×375"


def _own_images(job: Job) -> float:
    """Of what the run trains on, through the loader that it will have, with one thread."""
    from pretrain.stream.loader import LoaderOptions, TrainLoader
    from pretrain.stream.order import Order

    index, spec = Index.open(job.data.train or ""), job.spec
    order = Order(index.samples, job.layout.micro_batch, 0, job.data.chunk)
    steps = max(-(-_DECODED // job.layout.micro_batch), 2)
    loader = TrainLoader(
        index,
        order,
        job.data.train_images(spec.image_size, spec.channels, 0),
        LoaderOptions(workers=1, floats=job.device == "cpu", timeouts=job.data.timeouts()),
        micro_batch=job.layout.micro_batch,
        stop_step=steps,
    )
    with loader:
        for _ in loader:
            pass
        did = loader.counters.seen()
    return 1e3 * (did["decode_seconds"] + did["augment_seconds"] + did["collate_seconds"]) / did["images"]


def _a_photo(job: Job) -> float:
    """Of a JPEG of 500×375, quality 90, decoded and cropped."""
    import numpy as np  # these take a second to import
    import simplejpeg

    from pretrain.images.decode import decode

    rows, columns = np.mgrid[0:375, 0:500]
    waves = [128 + 60 * np.sin(rows / a) + 60 * np.cos(columns / b) for a, b in ((3, 5), (7, 4), (11, 13))]
    noise = np.random.default_rng(0).normal(0, 8, (375, 500, 3))
    image = (np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90)
    crop = job.data.train_images(job.spec.image_size, job.spec.channels, 0)
    spent = []
    with arithmetic.threads(1):
        for number in range(_DECODED):
            began = time.perf_counter()
            crop(decode(encoded, job.spec.channels), 0, number)
            spent.append(time.perf_counter() - began)
    return 1e3 * statistics.median(spent)


def _rank(rank: int, ranks: int, folder: str, job: Job, free: int) -> None:
    """What one of several processes measures."""
    torch.set_num_threads(threads(ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    device = torch.device("cpu")
    flops, bandwidth, said = _passes(job, device, free)
    values = torch.zeros(_REDUCED)
    seconds = _median(lambda: dist.all_reduce(values), device, budget=3)
    sent = 2 * (ranks - 1) / ranks * values.nbytes
    torch.save((flops, bandwidth, sent / seconds, said), Path(folder) / str(rank))
    dist.barrier()


def threads(ranks: int) -> int:
    """Threads that a rank on a CPU computes with: as the environment says, else its share of the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else max((os.cpu_count() or 1) // ranks, 1)


def _passes(job: Job, device: torch.device, free: int) -> tuple[float, float, str]:
    """FLOP/s of forward and backward passes, bytes/s of an update, and how they were measured."""
    micro = job.layout.micro_batch
    kind = job.checkpointing if isinstance(job.checkpointing, str) else "none"  # a few blocks have no k-th one
    job = replace(job, frozen=0, checkpointing=kind)
    while micro > 1 and _needed(job, _shallow(job.spec, _FEW[1]), micro) > free:
        micro //= 2
    first = _time(job, _shallow(job.spec, _FEW[0]), micro, device, budget=0)
    whole = first * job.spec.layers * (_LEAST + 1) < _SECONDS and _needed(job, job.spec, micro) <= free
    if whole:
        seconds = _time(job, job.spec, micro, device, budget=_SECONDS)
        how = "the whole network"
    else:
        few = [_time(job, _shallow(job.spec, layers), micro, device, budget=_SECONDS / 2) for layers in _FEW]
        block = (few[1] - few[0]) / (_FEW[1] - _FEW[0])
        seconds = few[0] + block * (job.spec.layers - _FEW[0])
        how = f"networks of {_FEW[0]} and {_FEW[1]} blocks, extrapolated to {job.spec.layers}"
    said = f"forward and backward passes of {how}, micro-batch {micro}: {seconds:.3g} s"
    return micro * flops_done(job) / seconds, _update_bandwidth(job, device), said


def _needed(job: Job, spec: ViTSpec, micro_batch: int) -> int:
    """Bytes that the passes of a network take, without an optimizer."""
    layout = replace(job.layout, micro_batch=micro_batch, accumulation=1, global_batch=micro_batch, ranks=1)
    memory = rank_memory(replace(job, spec=spec, layout=layout))
    return memory.parameters + memory.gradients + memory.activations + memory.outside


def _shallow(spec: ViTSpec, layers: int) -> ViTSpec:
    return replace(spec, layers=min(layers, spec.layers), drop_path=0.0)


def _time(job: Job, spec: ViTSpec, micro_batch: int, device: torch.device, budget: float) -> float:
    """Median seconds of a forward and backward pass of a micro-batch; the first of them is not counted."""
    model = VisionTransformer(spec, job.checkpointing, job.compiled)
    initialize(model, 0)
    model.to(device, job.dtype).train()
    images = torch.rand(micro_batch, spec.channels, spec.image_size, spec.image_size, device=device).to(job.dtype)
    labels = torch.randint(spec.num_classes, (micro_batch,), device=device)
    loss: Callable[[Tensor], Tensor]
    if job.loss == "softmax":
        loss = partial(F.cross_entropy, target=labels)
    else:
        targets = F.one_hot(labels, spec.num_classes).float()
        loss = partial(F.binary_cross_entropy_with_logits, target=targets)

    def once() -> None:
        loss(model(images).float()).backward()
        model.zero_grad(set_to_none=True)

    return _median(once, device, budget=budget)


def _update_bandwidth(job: Job, device: torch.device) -> float:
    """Bytes/s of an update of fp32 weights, with the norm of the gradients and clipping."""
    weights = nn.Parameter(torch.zeros(_UPDATED, device=device))
    weights.grad = torch.ones_like(weights)
    optimizer: Any = torch.optim.AdamW([weights], fused=True)

    def once() -> None:
        nn.utils.clip_grad_norm_([weights], 1.0)
        optimizer.step()

    return touched_bytes(2, clipped=True) * _UPDATED / _median(once, device, budget=2)


def _median(once: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median seconds of `once`, repeated for about `budget` seconds after a first time; ranks begin together."""
    spent: list[float] = []
    once()
    for _ in range(1 if budget == 0 else _MOST):
        if dist.is_initialized():
            dist.barrier()
        _wait(device)
        began = time.perf_counter()
        once()
        _wait(device)
        spent.append(time.perf_counter() - began)
        over = torch.tensor([float(sum(spent) > budget)])
        if dist.is_initialized():
            dist.all_reduce(over)  # the ranks end together
        if over.item() and len(spent) >= _LEAST:
            break
    return statistics.median(spent)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
