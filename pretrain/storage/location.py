"""Where shards are: names, patterns and folders to paths and URLs."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

import braceexpand

from pretrain import files
from pretrain.errors import InputError
from pretrain.storage.filekind import COMPRESSED_ENDINGS, IMAGE_ENDINGS
from pretrain.storage.store import check_url, in_bucket, is_remote, list_shards

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
        # What follows is not shown: it may be a command, or hold a password.
        raise InputError(
            f"{scheme.group()}…: '{scheme.group()}' is not read here; shards are local paths or URLs of http, https, "
            f"s3 and gs, indices are local paths (a file whose name holds a colon is written ./{scheme.group()}…)"
        )
    if not text or "\0" in text:
        raise InputError(f"{text!r}: not a path")
    return Path(text)


def expand(patterns: Iterable[str | Path]) -> list[str]:
    """Files, URLs, patterns of them (`shard-{000..009}.tar`, `train/*.tar`) and folders (their *.tar) → paths and URLs.

    The matches of a `*` and the shards of a folder, local or of s3:// and gs://, come in name order.

    Raises InputError for what is missing (remote shards are asked for later), a folder without shards, a broken
    pattern or one that nothing matches, and a shard named twice.
    """
    found: list[str] = []
    for pattern in patterns:
        found += _remote_shards(str(pattern)) if is_remote(pattern) else _local_shards(pattern)
    seen: set[str] = set()
    for shard in found:
        remote = is_remote(shard)
        path = shard if remote else os.path.abspath(shard)
        if path in seen:
            raise InputError(f"{shard}: named twice; every shard counts once")
        seen.add(path)
        if not remote and not files.exists(path):
            raise InputError(f"{shard}: no such shard")
        if not remote and not files.is_file(path):
            raise InputError(f"{shard}: not a file")
    if not found:
        raise InputError("no shards given")
    return found


def _local_shards(pattern: str | Path) -> list[str]:
    path = local_path(pattern)
    if files.is_folder(path):
        shards = sorted(str(path / name) for name in os.listdir(path) if _is_shard_name(name))
        if not shards:
            raise InputError(
                f"{path}: no *.tar in this folder; give the folder that holds the shards{likely_mistake(path)}"
            )
        return shards
    if files.exists(path):
        return [str(path)]
    found: list[str] = []
    for one in _expand_braces(str(pattern)) if "{" in str(pattern) else [str(path)]:
        found += _matched(one) if glob.has_magic(one) and not files.exists(one) else [one]
    return found


def _matched(pattern: str) -> list[str]:
    """The files that match a pattern of `*`, `?` and `[…]`, in name order."""
    matched = sorted(glob.glob(pattern))
    if not matched:
        folder = os.path.dirname(pattern) or "."
        if not glob.has_magic(folder) and files.is_folder(folder):
            os.listdir(folder)  # raises where it may not be read
        raise InputError(f"{pattern}: no file matches this pattern")
    return matched


def likely_mistake(folder: Path) -> str:
    """A hint for a folder without what was expected: what it holds instead, and what to do; empty where it has shards.

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

    The folder is resolved, the file is not: `..` must mean the same to the writer and to the kernel, and an index that
    is itself a link (into a download cache) belongs where the link lies.
    """
    return os.path.realpath(index.parent)


def stored_path(shard: str | Path, index: Path) -> str:
    """How `index` records a shard: a URL as it is, a path relative to the index's folder, so both may move together."""
    if is_remote(shard):
        return str(shard)
    path = local_path(shard)
    return os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), home(index))
