"""Shards as users have them → their index: headers and labels are read in parallel; the first fault is named."""

from __future__ import annotations

import json
import os
import sys
import threading
from array import array
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain import files
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.index.indexfile import INDEX_NAME, LARGEST_SHARD, IndexFile, digest_text, sha256_of
from pretrain.index.tar import ShardTar, TarSample
from pretrain.shards.indexwriter import IndexWriter, ShardColumns, ShardEntry
from pretrain.shards.keys import KeyHashes, wide_hash
from pretrain.storage.location import expand, local_path, stored_path
from pretrain.storage.shardfile import RemoteFile, open_shard, open_whole
from pretrain.storage.store import is_remote, object_name, stat, url_under
from pretrain.workers import map_shards

LARGEST_LABEL = 2**31 - 1
_LONGEST_LABEL_MEMBER = {"cls": 64, "json": 1 << 20}  # bytes
_REMOTE_THREADS = 32  # in each process: they wait for one small request after another


@dataclass(frozen=True)
class ShardScan:
    """What one shard holds: its entry in the index, 64-bit hashes of its keys, uint64 [n], and how many of its files
    can hold no sample, with the first of them.
    """

    entry: ShardEntry
    keys: np.ndarray
    passed_over: int = 0
    first_passed_over: str = ""


def index_shards(
    patterns: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    base: str | None = None,
    num_classes: int | None = None,
    content: bool | None = None,
    workers: int | None = None,
) -> Path:
    """Scan shards in the order given and write their index. Class names come from an index of the same samples that is
    at `out` or beside the shards. Files that can hold no sample are skipped; a line on stderr counts them.

    Args:
        patterns: Files, URLs, brace patterns, folders.
        out: The index; by default `index.vfi` in the local folder that holds the shards.
        base: A URL; the shards are recorded as lying under it, by their file names.
        num_classes: Labels have to be smaller.
        content: Whether shards are read whole, to record their sha256; by default only local ones, and remote ones are
            recorded with their etag. Without either, other images of the same sizes go unnoticed.
        workers: Processes.

    Returns the index's path. Memory does not grow with the samples; temporary files beside the index take 32 bytes
    each. Raises InputError at the first fault, naming shard, member or sample and byte; then nothing is written.
    """
    shards = expand(patterns)
    path = _out_path(shards, out)
    urls = [stored_path(shard, path) for shard in shards] if base is None else _under(base, shards)
    jobs = [ScanJob(shard, num_classes, not is_remote(shard) if content is None else content) for shard in shards]
    threads = _REMOTE_THREADS if any(is_remote(shard) for shard in shards) else 1
    with (
        IndexWriter(path) as writer,
        KeyHashes(path.parent) as keys,
        closing(map_shards(_scan, jobs, doing="indexing", workers=workers, threads=threads)) as scans,
    ):
        passed_over, first = 0, ""
        for shard, url, scan in zip(shards, urls, scans, strict=True):
            passed_over += scan.passed_over
            first = first or (f"{scan.first_passed_over} of {shard}" if scan.passed_over else "")
            digest = scan.entry.digest if base is None else digest_text(sha256_of(scan.entry.digest))
            writer.add(replace(scan.entry, url=url, digest=digest))
            keys.add(scan.keys)
        keys.refuse_shared(shards, writer.offsets)
        writer.finish(_class_names(writer.sequence(), path, shards))
    if passed_over:
        say(f"note: passed over {passed_over:,} files that can hold no sample, the first {first}", to=sys.stderr)
    return path


@dataclass(frozen=True)
class ScanJob:
    """A shard to scan, and how; see `index_shards`."""

    url: str
    num_classes: int | None = None
    digest: bool = False


def _scan(job: ScanJob, stop: threading.Event) -> ShardScan:
    try:
        return scan_shard(job.url, job.num_classes, job.digest, stop=stop)
    except OSError as error:
        raise files.failure(job.url, error) from error


def scan_shard(
    url: str, num_classes: int | None = None, digest: bool = False, *, stop: threading.Event | None = None
) -> ShardScan:
    """Read one shard's headers and labels; with `digest` all of it. Raises InputError at the first fault, and
    CancelledError once `stop` is set, where the shard is remote.
    """
    etag = stat(url, stop=stop).etag if digest and is_remote(url) else ""
    with (open_whole if digest else open_shard)(url, stop=stop) as file:
        tar = ShardTar(file, url)
        if tar.size > LARGEST_SHARD:
            raise InputError(f"{url}: {tar.size} bytes; the index reaches {LARGEST_SHARD}: write smaller shards")
        columns, keys, lists = ShardColumns(), array("Q"), False
        for sample in tar.samples():
            columns.add(sample.begin, sample.key, read_labels(file, sample, url, num_classes))
            keys.append(wide_hash(sample.key))
            lists = lists or sample.label == "json"
        content = digest_text(files.sha256(file), etag) if digest else digest_text(etag=_etag(file))
        entry = columns.entry(url, bytes=tar.size, data_end=tar.data_end, digest=content, lists=lists)
    return ShardScan(entry, np.array(keys, np.uint64), tar.passed_over, tar.first_passed_over)


def _etag(file: BinaryIO) -> str:
    return file.stat.etag if isinstance(file, RemoteFile) else ""


def read_labels(file: BinaryIO, sample: TarSample, url: str, num_classes: int | None = None) -> list[int]:
    """The labels of a sample: its `.cls` (one integer) or, without one, its `.json` (a list of integers, none
    twice).

    Raises InputError for anything else, and for labels outside 0 … num_classes−1.
    """
    suffix = sample.label
    at, size = sample.members[suffix]
    where = f"{url}: sample {sample.key!r}, .{suffix} at byte {at}"
    if size > _LONGEST_LABEL_MEMBER[suffix]:
        raise InputError(f"{where}: {size} bytes are no label; a label is {_shape(suffix)}")
    file.seek(at)
    text = file.read(size)
    labels = _parse_cls(text) if suffix == "cls" else _parse_json(text)
    if labels is None:
        raise InputError(f"{where}: found {_shown(text)}; a label is {_shape(suffix)}")
    limit = LARGEST_LABEL if num_classes is None else num_classes - 1
    for label in labels:
        if not 0 <= label <= limit:
            raise InputError(f"{where}: label {label} is out of range; labels are 0 … {limit}")
    if len(set(labels)) < len(labels):
        raise InputError(f"{where}: found {_shown(text)}; a class is listed once")
    return labels


def _parse_cls(text: bytes) -> list[int] | None:
    digits = text.strip()
    return [int(digits)] if digits.removeprefix(b"-").isdigit() else None


def _parse_json(text: bytes) -> list[int] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or any(type(label) is not int for label in found):
        return None
    return found


def _shape(suffix: str) -> str:
    return "one integer in decimal digits" if suffix == "cls" else "a JSON list of integers, e.g. [3, 17]"


def _shown(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace")) + ("…" if len(text) > 40 else "")


def _under(base: str, shards: Sequence[str]) -> list[str]:
    """The URLs of `shards` where a copy of them lies under `base`."""
    if not is_remote(base):
        raise InputError(f"--base {base}: not a URL of a folder; e.g. s3://bucket/train/ would be right")
    urls = [url_under(base, object_name(shard) if is_remote(shard) else os.path.basename(shard)) for shard in shards]
    seen: dict[str, str] = {}
    for url, shard in zip(urls, shards, strict=True):
        if url in seen:
            raise InputError(f"--base {base}: {seen[url]} and {shard} would both be {url}; index them apart")
        seen[url] = shard
    return urls


def _class_names(sequence: str, path: Path, shards: Sequence[str]) -> tuple[str, ...] | None:
    """The class names of an index with that sequence of samples at `path`, or beside the shards."""
    folders = {os.path.dirname(shard) for shard in shards if not is_remote(shard)}
    for known_path in (path, *(Path(folder) / INDEX_NAME for folder in folders if len(folders) == 1)):
        with suppress(InputError):
            known = IndexFile(known_path)
            if known.sequence == sequence and known.classes:
                return known.classes
    return None


def _out_path(shards: Sequence[str], out: str | Path | None) -> Path:
    if out is not None:
        path = local_path(out)
        if files.is_folder(path):
            path /= INDEX_NAME
        elif path.suffix == ".tar":
            raise InputError(f"--out {path}: that is a shard's name; an index is named like {INDEX_NAME}")
        if not files.is_folder(path.parent):
            raise InputError(f"--out {path}: no folder {path.parent}")
        return path
    if any(is_remote(shard) for shard in shards):
        raise InputError("remote shards; say where on a local disk their index goes: --out FILE")
    folders = sorted({os.path.dirname(shard) or "." for shard in shards})
    if len(folders) > 1:
        raise InputError(
            f"shards lie in {len(folders)} folders ({folders[0]}, {folders[1]}, …); say where the index "
            "goes: --out FILE"
        )
    return Path(folders[0]) / INDEX_NAME
