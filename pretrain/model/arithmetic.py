"""The arithmetic of a network: fp32 that is fp32, on how many threads, and what its types are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, products of fp32 numbers are computed in fp32: not in TF32, which cuDNN's convolutions use by default,
    nor in bf16, which oneDNN may use.
    """
    backends: Any = torch.backends  # parts of which type checkers do not see
    parts: list[Any] = []
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9
        parts = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        parts += [backends.mkldnn.matmul, backends.mkldnn.conv]
    # The older switches too: torch raises where the two kinds contradict each other.
    matmul = _unless_mixed(torch.get_float32_matmul_precision)
    convolution = _unless_mixed(lambda: backends.cudnn.allow_tf32)
    before = [part.fp32_precision for part in parts]
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            backends.cudnn.allow_tf32 = convolution
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch computes on `count` threads of the CPU, here and in Python threads that begin inside.

    On how many the terms of a product or an eigendecomposition are shared changes their last digits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _unless_mixed(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # the newer switches are set, and the older ones cannot tell
        return None


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32", "bfloat16", …"""
    return str(dtype).removeprefix("torch.")
