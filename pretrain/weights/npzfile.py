"""NumPy's `.npz`: a zip archive of arrays, read and written one array at a time and never unpickled."""

from __future__ import annotations

import errno
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain import files
from pretrain.errors import InputError

_MOST_INFLATED = 50  # an archive that unpacks to more times its size is none of weights
_COMMENT = b"vit_foundry "  # what the comment of an archive written here begins with
_BFLOAT16 = np.dtype("V2")  # NumPy has no bfloat16: JAX's are saved as two bytes without a type


def read(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor], dict[str, str]]:
    """The shapes of the arrays by name, a function that reads one of them, and the metadata.

    Raises:
        InputError: no archive of arrays, or a damaged one; names the array. So does the function.
    """
    with _refusing(f"weights {path}"):
        archive = zipfile.ZipFile(path)
        members = _members(archive, path)
        notes = _notes(archive.comment)
    shapes = {}
    for name, info in members.items():
        with _refusing(f"weights {path}: {name}"):
            shapes[name] = _shape(archive, info)

    def values(name: str) -> Tensor:
        # Zip has a checksum of every member, and the last byte is always read: a changed value does not pass.
        with _refusing(f"weights {path}: {name}"), archive.open(members[name]) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            if array.dtype == _BFLOAT16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

    return shapes, values, notes


def write(
    path: Path, tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> dict[str, int | str]:
    """Write named fp32 tensors to a new archive, uncompressed and flushed to the disk. Equal tensors give equal files.

    Args:
        tensors: of any shape, on any device.
        metadata: texts by name. They are kept in the archive's comment, which NumPy and other readers pass over.

    Returns:
        {"bytes": size, "sha256": hex digest of the file}. Nothing is held in memory beyond the tensors themselves.
    """
    with path.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, tensor in tensors:
                # One after the other: a view to be laid out is copied only while it is written. ZipInfo's own time is
                # 1980, so that the hour of writing is not in the file.
                array = tensor.detach().cpu().contiguous().numpy()
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=array.nbytes > 2**31 - 2**20) as to:
                    np.lib.format.write_array(to, array, allow_pickle=False)
            if metadata:
                text = json.dumps(dict(metadata)).encode()
                archive.comment = _COMMENT + b"%08x " % zlib.crc32(text) + text
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what zipfile, zlib, NumPy's and Python's parsers raise of damaged bytes
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the file system's; EINVAL: a place before 0
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{what}: cannot be read as .npz: {said}; the file is damaged, cut short or no .npz") from None


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members by the names of their arrays."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in members:
            raise InputError(f"weights {path}: {name} is there twice; which one is meant cannot be told")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # NumPy writes no other
            raise InputError(f"weights {path}: {name} is compressed by method {info.compress_type}; save it with NumPy")
        members[name] = info
    end = 22 + len(archive.comment)  # of the record at the end of every archive, the number of members in it
    with path.open("rb") as file:
        file.seek(-end, os.SEEK_END)
        record = file.read(12)
    # zipfile passes over members that a damaged directory has lost; 0xFFFF is any number from there.
    announced = int.from_bytes(record[10:], "little")
    if record[:4] != b"PK\x05\x06" or announced not in (len(archive.infolist()), 0xFFFF):
        raise ValueError(f"{len(members)} members of {announced} that its end announces")
    inflated, size = sum(info.file_size for info in members.values()), path.stat().st_size
    if inflated > _MOST_INFLATED * size:
        raise InputError(
            f"weights {path}: unpacks from {size:,} to {inflated:,} bytes; no archive of weights does that"
        )
    return members


def _shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, ...]:
    """The shape of an array, whose bytes must be those that its header announces."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):  # (3, 0) is of arrays of structures
            raise ValueError(f"an array of format {version}")
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
        announced = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError("a pickle, which is never read")
    if any(side < 1 for side in shape) or announced != info.file_size:
        raise ValueError(f"an array of {info.file_size} bytes whose header announces {list(shape)} of {dtype}")
    return tuple(shape)


def _notes(comment: bytes) -> dict[str, str]:
    """The metadata; empty where the archive was not written here. Zip has no checksum of a comment, so this has one."""
    if not comment.startswith(_COMMENT):
        return {}
    crc, _, text = comment.removeprefix(_COMMENT).partition(b" ")
    if int(crc, 16) != zlib.crc32(text):
        raise ValueError("its description, the comment of the archive, is not what was written")
    found: dict[str, str] = json.loads(text)
    return found
