"""Where shards are: names and patterns to paths, and the one door through which a shard is opened."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import BinaryIO, cast

import braceexpand

from pretrain import files
from pretrain.errors import InputError, StorageError
from pretrain.storage import store
from pretrain.storage.filekind import COMPRESSED_ENDINGS, IMAGE_ENDINGS
from pretrain.storage.remotefile import RemoteFile
from pretrain.storage.retry import Timeouts
from pretrain.storage.store import check_url, in_bucket, is_remote, list_shards

_PAUSES = (0.5, 2.0, 8.0)  # seconds before each further attempt; a disk that is broken stays so

# Two letters or more before the colon. `pipe:` (a shell, in webdataset) is a scheme like any other: refused.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def local_path(url: str | Path) -> Path:
    """The path of a local file or folder. Raises InputError for any URL."""
    text = str(url)
    scheme = _SCHEME.match(text)
    if is_remote(text):
        check_url(text)
        raise InputError(f"{text}: only shards are read from a URL; copy it to a local disk and give its path")
    if scheme:
        # What stands behind is not told: a command, or a password in one.
        raise InputError(
            f"{scheme.group()}…: '{scheme.group()}' is not read here; shards are local paths or URLs of http, https, "
            f"s3 and gs, indices are local paths (a file whose name holds a colon is written ./{scheme.group()}…)"
        )
    if not text or "\0" in text:
        raise InputError(f"{text!r}: not a path")
    return Path(text)


def open_shard(url: str | Path, *, stop: threading.Event | None = None) -> BinaryIO:
    """A shard, local or remote, opened for seekable binary reading. Every reader of whole shards comes through here.

    Raises InputError when it is missing, not a file, or not readable. Reading a remote one raises CancelledError
    once `stop` is set.
    """
    if is_remote(url):
        return cast(BinaryIO, RemoteFile(str(url), stop=stop))
    path = local_path(url)
    try:
        return open(path, "rb")
    except OSError as error:
        raise files.failure(path, error) from error


def open_whole(url: str, *, stop: threading.Event | None = None) -> BinaryIO:
    """A shard that will be read whole, and not just once: a remote one is copied to a temporary file (in TMPDIR).

    Raises as `open_shard`, and InputError when the copy does not fit on the disk.
    """
    file = open_shard(url, stop=stop)
    if not is_remote(url):
        return file
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller's)
    try:
        shutil.copyfileobj(file, copy, 4 << 20)
    except OSError as error:
        raise InputError(
            f"{url}: its copy in {tempfile.gettempdir()} cannot be written: {error.strerror}; name a larger disk in "
            "TMPDIR"
        ) from error
    copy.seek(0)
    return cast(BinaryIO, copy)


def _new_memory(size: int) -> memoryview:
    return memoryview(bytearray(size))


def read_range(
    url: str,
    begin: int,
    end: int,
    etag: str = "",
    size: int = 0,
    *,
    timeouts: Timeouts | None = None,
    stop: threading.Event | None = None,
    take: Callable[[int], memoryview] = _new_memory,
) -> memoryview:
    """Bytes [begin, end) of a shard, all of them. Every reader of samples comes through here.

    `etag` and `size` (0: not known) are what was indexed. `timeouts` is how long is waited for a remote shard (default:
    `retry.TIMEOUTS`), `stop` an event that ends the waiting with CancelledError. The bytes of a local shard lie in
    memory from `take`. Raises InputError when the shard is missing, not readable, changed, or ends before `end`;
    StorageError where that may pass.
    """
    if is_remote(url):
        return memoryview(store.read_range(url, begin, end, etag, size, timeouts=timeouts, stop=stop))
    path, data = local_path(url), take(end - begin)
    for pause in (*_PAUSES, None):
        try:
            at, found = _fill(path, begin, data)
            break
        except OSError as error:
            passing = error.errno in files.PASSING
            if pause is None or not passing:
                text = f"{path}: bytes {begin}-{end} cannot be read: {error.strerror}"
                # EIO is also what a broken disk says, and goes on saying.
                raise (StorageError if passing and error.errno != errno.EIO else InputError)(text) from error
            if (stop or threading.Event()).wait(pause):
                raise CancelledError from None
    if at < end:
        raise InputError(
            f"{path}: truncated: the index places samples in bytes {begin}-{end}, the file ends at byte "
            f"{at}; copy or write the shard again"
        )
    if size and found > size:
        raise InputError(
            f"{path}: changed since it was indexed: {found} bytes, not {size}; restore it, or index it again and start "
            "a new run"
        )
    return data


def _fill(path: Path, begin: int, data: memoryview) -> tuple[int, int]:
    """Read a file from `begin` on until `data` is full or it ends; the byte reached, and the file's size."""
    at = begin
    # Not by way of a buffered file, which would copy what it reads once more.
    with open(path, "rb", buffering=0) as file:
        while at < begin + len(data) and (count := os.preadv(file.fileno(), [data[at - begin :]], at)):
            at += count
        return at, os.fstat(file.fileno()).st_size


def expand(patterns: Iterable[str | Path]) -> list[str]:
    """Files and URLs, patterns of them (`shard-{000..009}.tar`, `train/*.tar`), and folders, local or of s3:// and
    gs:// (their *.tar) → paths and URLs; what a `*` stands for, and a folder, in name order.

    Raises InputError for what is missing (remote shards are asked for later), a folder without shards, a broken
    pattern or one that nothing matches, and a shard named twice.
    """
    found: list[str] = []
    for pattern in patterns:
        found += _remote_shards(str(pattern)) if is_remote(pattern) else _local_shards(pattern)
    seen: set[str] = set()
    for shard in found:
        remote = is_remote(shard)
        place = shard if remote else os.path.abspath(shard)
        if place in seen:
            raise InputError(f"{shard}: named twice; every shard counts once")
        seen.add(place)
        if not remote and not files.exists(place):
            raise InputError(f"{shard}: no such shard")
        if not remote and not files.is_file(place):
            raise InputError(f"{shard}: not a file")
    if not found:
        raise InputError("no shards given")
    return found


def _local_shards(pattern: str | Path) -> list[str]:
    path = local_path(pattern)
    if files.is_folder(path):
        shards = sorted(str(path / name) for name in os.listdir(path) if _is_shard_name(name))
        if not shards:
            raise InputError(f"{path}: no *.tar in this folder; give the folder that holds the shards{meant(path)}")
        return shards
    if files.exists(path):
        return [str(path)]
    found: list[str] = []
    for one in _expand_braces(str(pattern)) if "{" in str(pattern) else [str(path)]:
        found += _matched(one) if glob.has_magic(one) and not files.exists(one) else [one]
    return found


def _matched(pattern: str) -> list[str]:
    """The files that a pattern of `*`, `?` and `[…]` stands for, in name order, as a shell and a folder have them."""
    matched = sorted(glob.glob(pattern))
    if not matched:
        folder = os.path.dirname(pattern) or "."
        if not glob.has_magic(folder) and files.is_folder(folder):
            os.listdir(folder)  # it may not be read
        raise InputError(f"{pattern}: no file matches this pattern")
    return matched


def meant(folder: Path) -> str:
    """What stands in a folder that was perhaps meant, and what to do with it; empty where it holds shards, or nothing.

    Raises OSError where it may not be read.
    """
    names = sorted(os.listdir(folder))
    if any(map(_is_shard_name, names)):
        return ""
    build = f"shards are made by: python launch/shards.py build {folder} DIR"
    for name in names:
        if name.endswith(".vfi"):
            return f" (the index {folder / name}?)"
        if name.lower().endswith(COMPRESSED_ENDINGS):
            return f" ({name} is compressed: shards are plain tars)"
        if name.lower().endswith(IMAGE_ENDINGS):
            return f" (of images, as {name}, {build})"
    for name in names:
        if name.startswith("."):
            continue
        for inner, folders, found in os.walk(folder / name):
            folders[:] = sorted(folders)[:1]  # train/, and a class in it, will do
            for file in sorted(found):
                if _is_shard_name(file):
                    return f" ({inner} holds some)"
                if file.lower().endswith(IMAGE_ENDINGS):
                    return f" (of images, as {os.path.relpath(os.path.join(inner, file), folder)}, {build})"
    return ""


def _remote_shards(pattern: str) -> list[str]:
    check_url(pattern)
    found: list[str] = []
    for url in _expand_braces(pattern):
        if "*" in url:
            folder, _, name = url.rpartition("/")
            if "*" in folder:
                raise InputError(f"{url}: in a URL only the last part may hold a *, e.g. s3://bucket/train/*.tar")
            shards = [one for one in list_shards(f"{folder}/") if fnmatch.fnmatchcase(one.rpartition("/")[2], name)]
            if not shards:
                raise InputError(f"{url}: no *.tar of this folder matches this pattern")
            found += shards
        elif url.endswith("/") or (in_bucket(url) and not url.endswith(".tar")):
            shards = list_shards(url)
            if not shards:
                raise InputError(f"{url}: no *.tar in this folder; give the folder that holds the shards")
            found += shards
        else:
            found.append(url)
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
    """How `index` records a shard: a URL as it is, a path relative to the index's folder, so that both may move
    together.
    """
    if is_remote(shard):
        return str(shard)
    path = local_path(shard)
    return os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), home(index))
