"""How long a step takes: what is computed at the pace that a device reaches, what is exchanged, the update."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch

from pretrain.plan.flops import macs_by_part, training_flops
from pretrain.plan.job import Cluster, Job
from pretrain.plan.traffic import Exchange, Fabric, Traffic, traffic

# Share of a device's peak that forward and backward passes reach in bf16, not compiled, by the network's width. From
# 768 on as measured on one H200 (docs/engine.md, "the network alone": B/16, L/16, H/14); below, guesses: small products
# do not fill a device. Others report for ViT-g/14 44 % on A100 and 29 % on H100 (NeMo).
_MFU = ((192, 0.10), (384, 0.20), (768, 0.33), (1024, 0.37), (1280, 0.41))
_COMPILED = 1.12  # compiled, L/16 and H/14 trained 1.13 to 1.15 times as fast on that device, B/16 1.06
# Of a block's forward pass, what the backward pass computes again under selective checkpointing: all that is cheap to
# compute, but moves memory.
_SELECTIVE = 0.15
# Under ZeRO 3 hooks around each block gather, free and check parameters: two CPU ranks took 1.3 times as long
# (`benchmarks/step.py` under ZeRO 3); a device, with less to do per hook, is taken to lose less. A guess.
_GATHERING = {"cpu": 1.3, "cuda": 1.2}
_HIDDEN = 0.8  # of the time of what is computed meanwhile, what communication can hide behind


@dataclass(frozen=True)
class Pace:
    """How fast a device works, by assumption or as measured."""

    flops: float  # FLOP/s that forward and backward passes reach where they are not compiled
    memory_bandwidth: float  # bytes/s that an update reaches
    host_link: float  # bytes/s between the memory of the device and the host's
    fabric: Fabric


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to; communication that computing hides is left out of `total`."""

    compute: float  # forward and backward passes of all micro-batches, what is computed again among them
    again: float  # of these, what activation checkpointing computes again
    traffic: Traffic
    exposed: float  # of the communication, what nothing hides
    update: float  # the optimizer's, with clipping and what offload moves
    data: float = 0.0  # what the images add: beyond the rest on a device, or of a CPU's cores

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.exposed + self.update + self.data


def assumed_mfu(job: Job) -> float:
    """The share of the peak that forward and backward passes are taken to reach."""
    width = job.spec.width
    if width <= _MFU[0][0]:
        return _MFU[0][1]
    for (low, least), (high, most) in pairwise(_MFU):
        if width <= high:
            return least + (most - least) * (width - low) / (high - low)
    return _MFU[-1][1]


def flops_again(job: Job) -> float:
    """Operations of an image's step that activation checkpointing adds, or what takes as long as they would."""
    spec, kind = job.spec, job.checkpointing
    if kind == "none":
        return 0.0
    parts = macs_by_part(spec)
    blocks = sum(macs for name, macs in parts.items() if name not in ("patch_embedding", "head"))
    trained = (spec.layers - min(max(job.frozen - 1, 0), spec.layers)) / spec.layers
    share = _SELECTIVE if kind == "selective" else 1.0 if kind == "full" else ceil(spec.layers / kind) / spec.layers
    return 2 * blocks * trained * share


def flops_done(job: Job) -> float:
    """Operations of an image's step, what is computed again among them."""
    return training_flops(job.spec, job.frozen) + flops_again(job)


def compiled_gain(job: Job) -> float:
    """By what factor `train.compile` is taken to quicken forward and backward passes."""
    return _COMPILED if job.compiled else 1.0


def step_time(job: Job, cluster: Cluster, parameters: int, pace: Pace) -> StepTime:
    """Seconds of a step of `job`, a network of so many parameters, the data apart."""
    images = job.layout.per_rank
    rate = pace.flops * compiled_gain(job) / (_GATHERING[job.device] if job.stage == 3 else 1)
    compute, again = (images * flops / rate for flops in (flops_done(job), flops_again(job)))
    found = traffic(exchange(job, parameters), cluster.nodes, cluster.devices, pace.fabric)
    return StepTime(compute, again, found, _exposed(job, found, compute), _update(job, cluster, parameters, pace))


def exchange(job: Job, parameters: int) -> Exchange:
    """What a step's traffic is a function of."""
    zero, half = job.deepspeed.zero_optimization, job.dtype is not torch.float32
    reduced = {"bf16": 2, "fp16": 2, "fp32": 4, None: 4}[job.deepspeed.communication_data_type]
    # A parameter that the backward pass needs again soon is not given back in between.
    reuse = 10**9 if zero.stage3_max_reuse_distance is None else zero.stage3_max_reuse_distance
    return Exchange(
        stage=job.stage,
        parameters=parameters,
        parameter_bytes=2 if half else 4,
        gradient_bytes=reduced,
        accumulation=job.layout.accumulation,
        bucket=zero.reduce_bucket_size or (500_000_000 if job.stage == 0 else 50_000_000),
        parts=job.spec.layers + 3,
        scattered=bool(zero.reduce_scatter),
        gathers=1 if 2 * parameters <= reuse else 2,
    )


def _exposed(job: Job, found: Traffic, compute: float) -> float:
    """What of the communication is not hidden: DeepSpeed gathers ahead under stage 3, and reduces in the background
    where `overlap_comm` says so, from stage 1 on.
    """
    overlapped = job.deepspeed.zero_optimization.overlap_comm
    overlapped = job.stage == 3 if overlapped is None else overlapped
    if job.stage == 0 or not overlapped:
        return found.seconds
    backward = 2 / 3 * compute / (job.layout.accumulation if job.stage == 1 else 1)
    if job.stage == 3:
        return max(found.seconds - _HIDDEN * compute, 0.0)
    return max(found.gradients - _HIDDEN * backward, 0.0) + found.parameters


def _update(job: Job, cluster: Cluster, parameters: int, pace: Pace) -> float:
    """Seconds of the update, which moves memory."""
    moments = 2 if job.optimizer.name == "adamw" else 1 if job.optimizer.momentum else 0
    averaged = job.optimizer.averaging is not None
    touched = touched_bytes(moments + averaged, clipped=job.optimizer.clip_norm > 0)
    values = parameters if job.stage == 0 else ceil(parameters / cluster.ranks)
    seconds = touched * values / pace.memory_bandwidth
    offload = job.deepspeed.zero_optimization.offload_optimizer
    if offload is not None and offload.device == "cpu":
        moved = values * (4 + (4 if job.dtype is torch.float32 else 2))
        seconds = touched * values * cluster.devices / HOST_BANDWIDTH + moved / pace.host_link
    return seconds


def touched_bytes(states: int, *, clipped: bool) -> int:
    """Bytes that an update reads and writes for a value: gradient, weight and so many states, all fp32.

    The gradient is read for the norm, read and written again to be clipped, and read by the update.
    """
    return 4 * (4 if clipped else 2) + 8 * (1 + states)


HOST_BANDWIDTH = 150e9  # bytes/s of a host's memory that updates of all its ranks share, where they are offloaded
