"""A file of tensors in the safetensors format: written in one pass and hashed on the way; read by the slice."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import InputError
from pretrain.files import ABSENT, patiently

_BLOCK = 1 << 24  # bytes written at a time


def write(
    path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> dict[str, int | str]:
    """Write named fp32 tensors to a new file, flushed to the disk.

    Args:
        tensors: of any shape, on any device.
        metadata: texts that the file's header holds, by name.

    Returns:
        {"bytes": size, "sha256": hex digest of the file}. Nothing is held in memory beyond the tensors themselves.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        # One tensor after the other: one on a device, or a view to be laid out, is copied only while it is written.
        blocks = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data for _, tensor in tensors)
        for block in itertools.chain([memoryview(len(text).to_bytes(8, "little") + text)], blocks):
            for start in range(0, len(block), _BLOCK):
                part = block[start : start + _BLOCK]
                digest.update(part)
                while part:
                    written = file.write(part)
                    size, part = size + written, part[written:]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


class Archive:
    """A file made by `write`, open for reading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = patiently(path, partial(safe_open, str(path), framework="pt", device="cpu"))
        except (*ABSENT, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None

    def read(self, name: str, begin: int, numel: int) -> Tensor:
        """The values [begin, begin + numel) of the tensor `name`.

        Raises:
            InputError: the file holds no such tensor, or a shorter one.
        """
        try:
            values = self._file.get_slice(name)[begin : begin + numel]
        except SafetensorError as error:
            raise InputError(f"{self._path}: {name}: {error}") from None
        if len(values) != numel:
            raise InputError(f"{self._path}: {name} ends at {begin + len(values)}, not {begin + numel}")
        return values
