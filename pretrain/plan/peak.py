"""How fast a device could be: the denominator of MFU."""

from __future__ import annotations

import time

import torch

from pretrain.engine.quiet import get_accelerator

# Dense TFLOP/s without sparsity, vendors' data sheets: (name contains, bf16, fp32 as torch runs it by default).
_DATA_SHEETS = (
    ("B200", 2250.0, 75.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("A10G", 70.0, 35.0),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("V100", 15.7, 15.7),
    ("MI300X", 1307.0, 163.4),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device in `dtype`: from its data sheet where known, else the best of a few matrix products."""
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", str)(device)
        for part, bf16, fp32 in _DATA_SHEETS:
            if part in name:
                return (bf16 if dtype is torch.bfloat16 else fp32) * 1e12
    return _measure(device, dtype)


def _measure(device: torch.device, dtype: torch.dtype, side: int = 768, tries: int = 5) -> float:
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(tries):
        get_accelerator().synchronize()
        began = time.perf_counter()
        a @ a
        get_accelerator().synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
