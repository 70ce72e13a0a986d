"""What the ranks send each other in a step under ZeRO 0 to 3, and how long it takes. Pure functions of numbers.

Of a buffer of S bytes each of N ranks sends 2·(N−1)/N·S in an all-reduce, and half of that in a reduce-scatter or an
all-gather, which is the least there can be (Patarasuk and Yuan 2009). So stages 0 to 2 send as much as data
parallelism, and stage 3 half as much again (Rajbhandari et al. 2020, §7), if gradients are reduced in the type that
parameters are gathered in, and once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]


@dataclass(frozen=True)
class Fabric:
    """What connects the devices. Bandwidths are those that collectives reach, in one direction."""

    within: float  # bytes/s from a device to others of its node
    between: float  # bytes/s from a node to others, all of its devices together
    # Seconds from a device to the next; NCCL's own figures for its bandwidth-bound protocol (`tuning.cc`).
    latency_within: float = 3.4e-6
    latency_between: float = 14e-6
    call: float = 20e-6  # to start a collective


@dataclass(frozen=True)
class Exchange:
    """What of a run its traffic is a function of."""

    stage: int  # of ZeRO
    parameters: int  # values
    parameter_bytes: int  # of a value as it is gathered: the type computed in
    gradient_bytes: int  # of a value as it is reduced
    accumulation: int = 1  # micro-batches of a rank in a step
    bucket: int = 50_000_000  # gradients that are reduced together
    parts: int = 1  # of the network that stage 3 gathers one by one
    scattered: bool = False  # stage 2: whether gradients are reduce-scattered instead of all-reduced
    gathers: int = 2  # stage 3: of each parameter in a micro-batch; 1 where it is kept for the backward pass


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step."""

    what: Literal["gradients", "parameters"]
    kind: Kind
    size: int  # bytes of the whole buffers, all calls together
    calls: int


def collectives(exchange: Exchange) -> list[Collective]:
    """What a step is made of, as DeepSpeed does it.

    Stages 0 and 1 reduce the sum of all micro-batches; stages 2 and 3 reduce each, as they keep only their part.
    """
    times = exchange.accumulation if exchange.stage >= 2 else 1
    kind: Kind = "all_reduce"
    if exchange.stage == 3 or (exchange.stage == 2 and exchange.scattered):
        kind = "reduce_scatter"
    size = exchange.parameters * exchange.gradient_bytes
    buckets = ceil(exchange.parameters / exchange.bucket)
    found = [Collective("gradients", kind, times * size, times * buckets)]
    gathered = exchange.parameters * exchange.parameter_bytes
    if exchange.stage in (1, 2):
        found.append(Collective("parameters", "all_gather", gathered, 1))
    if exchange.stage == 3:
        times *= exchange.gathers
        found.append(Collective("parameters", "all_gather", times * gathered, times * exchange.parts))
    return found


def bytes_sent(one: Collective, ranks: int) -> float:
    """Bytes that each rank sends."""
    return (2 if one.kind == "all_reduce" else 1) * (ranks - 1) / ranks * one.size


def seconds_of(one: Collective, nodes: int, devices: int, fabric: Fabric) -> float:
    """Seconds that it takes on `nodes` of `devices` each.

    Rings pass through a node device by device, and leave it over its network: whichever of the two is slower tells. A
    chunk must have gone all the way round: along the ring, or, of an all-reduce, up and down a tree.
    """
    ranks = nodes * devices
    if ranks == 1:
        return 0.0
    sent = bytes_sent(one, ranks)
    transfer = max(sent / fabric.within if devices > 1 else 0.0, sent / fabric.between if nodes > 1 else 0.0)
    if one.kind == "all_reduce":
        way = 2 * (log2(devices) * fabric.latency_within + log2(nodes) * fabric.latency_between)
    else:
        way = nodes * (devices - 1) * fabric.latency_within + (nodes - 1) * fabric.latency_between
    return transfer + one.calls * (fabric.call + way)


@dataclass(frozen=True)
class Traffic:
    """A step's communication."""

    sent: int  # bytes, by each rank
    gradients: float  # seconds
    parameters: float  # seconds

    @property
    def seconds(self) -> float:
        """All of it, as if nothing were computed meanwhile."""
        return self.gradients + self.parameters


def traffic(exchange: Exchange, nodes: int, devices: int, fabric: Fabric) -> Traffic:
    """A step's communication on `nodes` of `devices` ranks each."""
    found = collectives(exchange)
    ranks = nodes * devices
    seconds = {"gradients": 0.0, "parameters": 0.0}
    for one in found:
        seconds[one.what] += seconds_of(one, nodes, devices, fabric)
    return Traffic(round(sum(bytes_sent(one, ranks) for one in found)), seconds["gradients"], seconds["parameters"])
