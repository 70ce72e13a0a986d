"""Where shards are: names and patterns to paths, and the one door through which a shard is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import braceexpand

from pretrain.errors import InputError

# Two letters or more before the colon. `pipe:` (a shell, in webdataset) is a scheme like any other: refused.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def local_path(url: str | Path) -> Path:
    """The path of a local shard or index. Raises InputError for any URL: only local files are read."""
    text = str(url)
    scheme = _SCHEME.match(text)
    if scheme:
        raise InputError(
            f"{text}: '{scheme.group()}' is not read here; shards and indices are local paths (a file whose "
            f"name holds a colon is written ./{text})"
        )
    if not text or "\0" in text:
        raise InputError(f"{text!r}: not a path")
    return Path(text)


def open_shard(url: str | Path) -> BinaryIO:
    """A shard opened for seekable binary reading. Every reader of whole shards comes through here.

    Raises InputError when it is missing, not a file, or not readable.
    """
    path = local_path(url)
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def expand(patterns: Iterable[str | Path]) -> list[str]:
    """Files, brace patterns (`shard-{000..009}.tar`) and folders (their *.tar in name order) → local paths.

    Raises InputError for what is missing, a folder without shards, a broken pattern and a shard named twice.
    """
    found: list[str] = []
    for pattern in patterns:
        path = local_path(pattern)
        if path.is_dir():
            shards = sorted(str(path / name) for name in os.listdir(path) if _is_shard_name(name))
            if not shards:
                raise InputError(f"{path}: no *.tar in this folder; give the folder that holds the shards")
            found += shards
        elif path.exists() or "{" not in str(pattern):
            found.append(str(path))
        else:
            found += _expand_braces(str(pattern))
    seen: set[str] = set()
    for shard in found:
        place = os.path.abspath(shard)
        if place in seen:
            raise InputError(f"{shard}: named twice; every shard counts once")
        if not os.path.exists(place):
            raise InputError(f"{shard}: no such shard")
        if not os.path.isfile(place):
            raise InputError(f"{shard}: not a file")
        seen.add(place)
    if not found:
        raise InputError("no shards given")
    return found


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern}: broken brace pattern: {error}; e.g. shard-{{000..009}}.tar") from error


def _is_shard_name(name: str) -> bool:
    return name.endswith(".tar") and not name.startswith(".")


def home(index: Path) -> str:
    """The folder that an index's relative paths start from.

    The folder is resolved, the file is not: `..` must mean the same to the writer and to the kernel, and an
    index that is itself a link (a download cache) belongs where the link lies.
    """
    return os.path.realpath(index.parent)


def stored_path(shard: str | Path, index: Path) -> str:
    """How `index` records a local shard: relative to its own folder, so that both may move together."""
    path = local_path(shard)
    return os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), home(index))


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
