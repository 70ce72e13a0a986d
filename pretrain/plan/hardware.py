"""Devices that a run can be planned for: their peak, their memory's speed, and what usually connects them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.errors import InputError, nearest
from pretrain.plan.peak import listed
from pretrain.plan.traffic import Fabric

# Of a data sheet's bandwidth, what collectives reach with buffers of some hundred megabytes, and what kernels reach
# that only move memory. Guesses on the careful side: NCCL's tests report 0.75 to 0.85 where nothing else runs.
FABRIC_REACHED, MEMORY_REACHED = 0.7, 0.8


@dataclass(frozen=True)
class Hardware:
    """A kind of device and what connects it. Bandwidths in bytes/s, as reached."""

    driver_name: str  # as `peak.listed` knows it; "cpu" of a CPU
    memory_bandwidth: float
    host_link: float  # between the device's memory and its host's
    fabric: Fabric


# By the name of --gpu: what the driver calls it; GB/s by the data sheets, in one direction: of its memory, of its link
# to the host, to the devices of its node (NVLink, or PCIe), and of a node's network (of the vendor's reference system
# with eight devices where there is one, else 100 Gb/s).
_SHEETS = {
    "b200": ("NVIDIA B200", 8000, 64, 900, 400),
    "h200": ("NVIDIA H200", 4800, 64, 450, 400),
    "h100": ("NVIDIA H100 80GB HBM3", 3350, 64, 450, 400),
    "a100": ("NVIDIA A100-SXM4-40GB", 1555, 32, 300, 200),
    "a100-80gb": ("NVIDIA A100-SXM4-80GB", 2039, 32, 300, 200),
    "v100": ("Tesla V100-SXM2-32GB", 900, 16, 150, 50),
    "mi300x": ("AMD Instinct MI300X", 5300, 64, 448, 400),
    "l40s": ("NVIDIA L40S", 864, 32, 32, 25),
    "a10g": ("NVIDIA A10G", 600, 32, 32, 12.5),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 1008, 32, 32, 12.5),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 936, 32, 32, 12.5),
}
GPUS = tuple(_SHEETS)


def hardware(name: str) -> Hardware:
    """A GPU by its name in `GPUS`. Raises InputError: there is no such one."""
    if name not in _SHEETS:
        near = nearest(name, GPUS)
        hint = f"did you mean {near}? " if near else ""
        raise InputError(
            f"--gpu {name}: not known; {hint}known: {' '.join(GPUS)}. For another one name the nearest, and say what "
            "differs: --tflops, --bandwidth-within, --bandwidth-between"
        )
    driver_name, memory, host, within, between = _SHEETS[name]
    fabric = Fabric(FABRIC_REACHED * within * 1e9, FABRIC_REACHED * between * 1e9)
    return Hardware(driver_name, MEMORY_REACHED * memory * 1e9, MEMORY_REACHED * host * 1e9, fabric)


# Ranks that are processes of a CPU host exchange over shared memory or the loopback device, and share its memory.
CPU = Hardware("cpu", 10e9, 10e9, Fabric(1e9, 1e9, 50e-6, 50e-6, 100e-6))


def usual_gpu(memory: float) -> str:
    """The name of the GPU that a run is planned for where only its memory is known, in GiB."""
    return "h200" if memory > 100 else "h100" if memory > 48 else "a100"


def has_bf16(name: str) -> bool:
    """Whether the data sheet of the GPU `name` has tensor cores for bf16."""
    return listed(hardware(name).driver_name, torch.bfloat16) is not None
