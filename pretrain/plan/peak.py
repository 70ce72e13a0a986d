"""How fast a device could be: the denominator of MFU."""

from __future__ import annotations

import re

import torch

# Dense TFLOP/s of matrix products, from the vendors' data sheets (half of what they give "with sparsity"), by the whole
# name that the driver tells; a part of a device (MIG), a laptop's version or a sister model has another name.
# Half precision is with sums in fp32, as torch takes them. fp32 is without TF32, which torch leaves off by default.
#            (name, bf16, fp16, fp32); None: no such tensor cores, the data sheet says nothing
_DATA_SHEETS: tuple[tuple[str, float | None, float, float], ...] = (
    (r"NVIDIA GB200", 2500, 2500, 80),
    (r"NVIDIA B200", 2250, 2250, 75),
    (r"NVIDIA GH200 (120GB|480GB|144G HBM3e)", 989.4, 989.4, 66.9),
    (r"NVIDIA H200", 989.4, 989.4, 66.9),
    (r"NVIDIA H[12]00 NVL", 835.5, 835.5, 60),
    (r"NVIDIA (H100 80GB HBM3|H800)", 989.4, 989.4, 66.9),
    (r"NVIDIA (H[18]00 PCIe|H100 80GB HBM2e)", 756, 756, 51),
    (r"NVIDIA H20", 148, 148, 44),
    (r"(NVIDIA )?A[18]00(-SXM4-40GB|-SXM4-80GB|-PCIE-40GB| 80GB PCIe)", 312, 312, 19.5),
    (r"NVIDIA A30", 165, 165, 10.3),
    (r"NVIDIA A40", 149.7, 149.7, 37.4),
    (r"NVIDIA A10", 125, 125, 31.2),
    (r"NVIDIA A10G", 70, 70, 35),
    (r"NVIDIA L40S", 362, 362, 91.6),
    (r"NVIDIA L40", 181, 181, 90.5),
    (r"NVIDIA L4", 121, 121, 30.3),
    (r"(Tesla|NVIDIA) V100-SXM2-(16|32)GB", None, 125, 15.7),
    (r"(Tesla|NVIDIA) V100-PCIE-(16|32)GB", None, 112, 14),
    (r"(Tesla|NVIDIA) V100S-PCIE-32GB", None, 130, 16.4),
    (r"(Tesla|NVIDIA) T4", None, 65, 8.1),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2, 364.2, 91.1),
    (r"NVIDIA RTX A6000", 154.8, 154.8, 38.7),
    (r"NVIDIA GeForce RTX 5090", 209.5, 209.5, 104.8),
    (r"NVIDIA GeForce RTX 4090", 165.2, 165.2, 82.6),
    (r"NVIDIA GeForce RTX 3090", 71.2, 71.2, 35.6),
    (r"AMD Instinct MI3(00|25)X", 1307.4, 1307.4, 163.4),
    (r"AMD Instinct MI250X", 191.5, 191.5, 47.9),  # of its two dies, each of which is a device, one
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device in `dtype` by its data sheet; None where none is known.

    Nothing is measured: on a CPU shared with others a measurement holds for a moment, and on an accelerator a product
    says as much about launches, clocks and power as about the peak. A wrong MFU is worse than none.
    """
    if device.type != "cuda":
        return None
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return None  # TF32 after all, which some containers switch on by an environment variable
    return listed(device_name(device), dtype)


def device_name(device: torch.device) -> str:
    """What an accelerator calls itself; "cpu" of a CPU."""
    if device.type == "cpu":
        return "cpu"
    return str(getattr(torch.get_device_module(device), "get_device_name", str)(device))


def unlisted(device: torch.device, dtype: torch.dtype) -> list[str]:
    """A note where an accelerator's peak is not known; of a CPU nobody expects it."""
    if device.type == "cpu" or peak_flops(device, dtype) is not None:
        return []
    return [
        f"note: the peak of {device_name(device)} in {str(dtype).removeprefix('torch.')} is not known, so MFU is left "
        "out; logging.peak_tflops (per device) sets it"
    ]


def listed(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s in `dtype` of the device that calls itself `name`; None where its data sheet is not listed here."""
    for pattern, bf16, fp16, fp32 in _DATA_SHEETS:
        if re.fullmatch(pattern, name):
            tera = {torch.bfloat16: bf16, torch.float16: fp16, torch.float32: fp32}.get(dtype)
            return tera * 1e12 if tera else None
    return None
