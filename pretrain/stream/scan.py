"""Shards as users have them → their index: headers and labels are read, in parallel, and every fault is
named.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from pretrain.errors import InputError
from pretrain.stream.indexfile import INDEX_NAME, LARGEST_SHARD, ShardEntry, key_hash, write_index
from pretrain.stream.location import expand, open_shard, stored_path
from pretrain.stream.progress import Progress
from pretrain.stream.tar import BLOCK, ShardTar, TarSample

LARGEST_LABEL = 2**31 - 1
_LONGEST_LABEL_MEMBER = {"cls": 64, "json": 1 << 20}  # bytes
_SHARDS_A_PROCESS = 4  # fewer are not worth starting one

Job = TypeVar("Job")
Found = TypeVar("Found")


@dataclass(frozen=True)
class ShardScan:
    """What one shard holds: its row and columns of the index, and 64-bit hashes of its keys, uint64 [n]."""

    entry: ShardEntry
    keys: np.ndarray


def index_shards(
    patterns: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    num_classes: int | None = None,
    digests: bool = False,
    workers: int | None = None,
) -> Path:
    """Scan shards (files, brace patterns, folders; in the order given) and write their index; returns its
    path.

    `out` defaults to `index.vfi` in the folder that holds the shards. Labels have to lie below `num_classes`
    where that is given. `digests` reads every shard whole to record its sha256. Raises InputError at the
    first fault, naming shard, member or sample and byte; then nothing is written.
    """
    shards = expand(patterns)
    path = _out_path(shards, out)
    jobs = [(shard, num_classes, digests) for shard in shards]
    scans = list(map_shards(_scan_job, jobs, workers=workers, doing="indexing"))
    refuse_shared_keys(shards, [scan.keys for scan in scans], [scan.entry.offsets for scan in scans])
    entries = [replace(scan.entry, url=stored_path(shard, path)) for shard, scan in zip(shards, scans, strict=True)]
    write_index(path, entries)
    return path


def scan_shard(url: str, num_classes: int | None = None, digest: bool = False) -> ShardScan:
    """Walk one shard's headers and read its labels. Raises InputError at the first fault."""
    with open_shard(url) as file:
        tar = ShardTar(file, url)
        if tar.size > LARGEST_SHARD:
            raise InputError(f"{url}: {tar.size} bytes; the index reaches {LARGEST_SHARD}: write smaller shards")
        offsets, hashes, keys = array("I"), array("I"), array("Q")
        labels, counts = array("i"), array("I")
        lists = False
        for sample in tar.samples():
            found = read_labels(file, sample, url, num_classes)
            offsets.append(sample.begin // BLOCK)
            hashes.append(key_hash(sample.key))
            keys.append(wide_hash(sample.key))
            labels.extend(found)
            counts.append(len(found))
            lists = lists or sample.label == "json"
        entry = ShardEntry(
            url=url,
            bytes=tar.size,
            data_end=tar.data_end,
            offsets=np.array(offsets, np.uint32),
            key_hashes=np.array(hashes, np.uint32),
            labels=np.array(labels, np.int32),
            label_counts=np.array(counts, np.uint32) if lists else None,
            digest=file_digest(file) if digest else "",
        )
    return ShardScan(entry, np.array(keys, np.uint64))


def _scan_job(job: tuple[str, int | None, bool]) -> ShardScan:
    return scan_shard(*job)


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


def wide_hash(key: str) -> int:
    """64 bits of a key, enough to suspect that two are equal; only the keys themselves prove it."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def file_digest(file: BinaryIO) -> str:
    """ "sha256:…" of a whole file."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(1 << 20):
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def refuse_shared_keys(shards: Sequence[str], keys: Sequence[np.ndarray], offsets: Sequence[np.ndarray]) -> None:
    """Raise InputError when one key occurs in two of `shards` (paths).

    `keys` are wide hashes, uint64 [n] a shard, `offsets` the samples' places in units of 512 bytes. Takes 24
    bytes of memory a sample.
    """
    every = np.concatenate(keys)
    ordered = np.sort(every)
    first = np.cumsum([0, *(len(part) for part in keys)])
    for suspect in np.unique(ordered[1:][ordered[1:] == ordered[:-1]]):
        places: dict[str, str] = {}
        for position in np.flatnonzero(every == suspect).tolist():
            shard = int(np.searchsorted(first, position, side="right")) - 1
            begin = int(offsets[shard][position - first[shard]]) * BLOCK
            key = _key_at(shards[shard], begin)
            if key in places:
                raise InputError(
                    f"{shards[shard]}: key {key!r} at byte {begin} also occurs in {places[key]}; keys are "
                    "unique over all shards of an index"
                )
            places[key] = shards[shard]


def _key_at(url: str, begin: int) -> str:
    with open_shard(url) as file:
        return next(sample.key for sample in ShardTar(file, url).samples() if sample.begin == begin)


def map_shards(
    function: Callable[[Job], Found], jobs: Sequence[Job], *, workers: int | None = None, doing: str
) -> Iterator[Found]:
    """`function` of every job, in order, spread over processes where there are many shards; shows progress.

    The first exception ends it.
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, -(-len(jobs) // _SHARDS_A_PROCESS))
    with Progress(doing, "shards", len(jobs)) as progress:
        if workers <= 1:
            for job in jobs:
                yield function(job)
                progress.advance()
            return
        # Spawned, not forked: the caller may have threads. Nothing heavy is imported by a scanning process.
        processes = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            for found in processes.map(function, jobs):
                yield found
                progress.advance()
        finally:
            processes.shutdown(cancel_futures=True)


def _out_path(shards: Sequence[str], out: str | Path | None) -> Path:
    if out is not None:
        path = Path(out)
        if path.is_dir():
            path /= INDEX_NAME
        elif path.suffix == ".tar":
            raise InputError(f"--out {path}: that is a shard's name; an index is named like {INDEX_NAME}")
        if not path.parent.is_dir():
            raise InputError(f"--out {path}: no folder {path.parent}")
        return path
    folders = sorted({os.path.dirname(shard) or "." for shard in shards})
    if len(folders) > 1:
        raise InputError(
            f"shards lie in {len(folders)} folders ({folders[0]}, {folders[1]}, …); say where the index "
            "goes: --out FILE"
        )
    return Path(folders[0]) / INDEX_NAME
