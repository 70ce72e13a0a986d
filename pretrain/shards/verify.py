"""The full check of an index against its shards: everything is read, compared and decoded."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain import files
from pretrain.errors import InputError
from pretrain.images.decode import UnreadableImage, decode
from pretrain.index.index import Index
from pretrain.index.indexfile import IndexFile, etag_of, key_hash, sha256_of
from pretrain.index.tar import BLOCK, ShardTar
from pretrain.shards.keys import KeyHashes, wide_hash
from pretrain.shards.scan import read_labels
from pretrain.storage.shardfile import open_whole
from pretrain.storage.store import is_remote, same_etag, stat
from pretrain.stream.chunk import Sample
from pretrain.stream.fault import ChunkError
from pretrain.workers import map_shards

_REMOTE_THREADS = 2  # a process: one shard is fetched while another is decoded
_FAULTS_A_SHARD = 20
_FAULTS_SHOWN = 20


@dataclass(frozen=True)
class Verified:
    """What was checked without a fault: counts, bytes read, and how many shards have no digest to compare with."""

    samples: int
    shards: int
    bytes: int
    without_digest: int

    def text(self) -> str:
        """The counts for reading."""
        counts = f"in order: {self.samples:,} samples, {self.bytes:,} bytes; shards: {self.shards:,}"
        if not self.without_digest:
            return counts
        return (
            f"{counts}\nnote: no sha256 or etag is recorded of {self.without_digest:,} shards: other images of the "
            "same sizes would have passed (index without --headers-only records sha256)"
        )


def verify(index: Index, *, workers: int | None = None) -> Verified:
    """Read every shard of `index` whole: size, digest, members, keys, labels and every image.

    Raises InputError listing the faults (the first 20 of them, each with its shard, sample and byte).
    """
    faults: list[str] = []
    without_digest = 0
    for file in index.files:
        try:
            file.check_content()
        except InputError as error:
            faults.append(str(error))
        jobs = [(str(file.path), shard) for shard in range(file.num_shards)]
        urls = [file.shard_url(shard) for shard in range(file.num_shards)]
        threads = _REMOTE_THREADS if any(is_remote(url) for url in urls) else 1
        doing = f"verifying {file.path}"
        with (
            KeyHashes() as seen,
            closing(map_shards(_check_shard, jobs, doing=doing, workers=workers, threads=threads)) as checks,
        ):
            for number, (found, keys) in enumerate(checks):
                faults += found
                seen.add(keys)
                without_digest += not file.digest(number)
            if not faults:
                seen.refuse_shared(urls, file.offsets)
    if faults:
        more = f"\nand {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InputError(f"{count} found\n" + "\n".join(faults[:_FAULTS_SHOWN]) + more)
    return Verified(index.samples, len(index.shards), sum(shard.bytes for shard in index.shards), without_digest)


def _check_shard(job: tuple[str, int], stop: threading.Event) -> tuple[list[str], np.ndarray]:
    """Faults of one shard of an index file, and the wide hashes of its keys."""
    path, number = job
    index = IndexFile(Path(path))
    faults: list[str] = []
    keys: list[int] = []
    try:
        for fault in _shard_faults(index, number, keys, stop):
            faults.append(fault)
            if len(faults) == _FAULTS_A_SHARD:
                faults.append(f"{index.shard_url(number)}: further faults of this shard are not looked for")
                break
    except InputError as error:
        faults.append(str(error))
    except OSError as error:
        faults.append(f"{index.shard_url(number)}: cannot be read: {error.strerror}")
    return faults, np.array(keys, np.uint64)


def _shard_faults(index: IndexFile, number: int, keys: list[int], stop: threading.Event) -> Iterator[str]:
    url = index.shard_url(number)
    first, end = int(index.first[number]), int(index.first[number + 1])
    if index.etag(number) and not same_etag(index.etag(number), etag := stat(url, stop=stop).etag):
        yield f"{url}: etag {etag}, the index says {index.etag(number)}: its bytes changed"
    with open_whole(url, stop=stop) as file:
        size = os.fstat(file.fileno()).st_size
        if size != int(index.shard_bytes[number]):
            yield f"{url}: {size} bytes, the index says {int(index.shard_bytes[number])}"
        recorded, digest = index.digest(number), files.sha256(file)
        if sha256_of(recorded) not in ("", digest):
            yield f"{url}: sha256 {digest[:12]}…, the index says {sha256_of(recorded)[:12]}…: its bytes changed"
        if recorded and not sha256_of(recorded) and not etag_of(recorded):
            yield f"{url}: the index says {recorded[:19]!r}…, which is no digest"
        tar = ShardTar(file, url)
        found = 0
        for row, sample in enumerate(tar.samples(), first):
            found += 1
            keys.append(wide_hash(sample.key))
            where = f"{url}: sample {sample.key!r} at byte {sample.begin}"
            if row >= end:
                continue
            if int(index.offsets[row]) * BLOCK != sample.begin:
                yield f"{where}: the index says byte {int(index.offsets[row]) * BLOCK}"
            if int(index.key_hashes[row]) != key_hash(sample.key):
                yield f"{where}: the index has another key there (crc32 differs)"
            labels, expected = read_labels(file, sample, url), _recorded_labels(index, row)
            if labels != expected:
                yield f"{where}: labels {labels}, the index says {expected}"
            until = int(index.offsets[row + 1]) * BLOCK if row + 1 < end else int(index.data_end[number])
            if sample.begin < until <= size:  # else its neighbour is at fault
                file.seek(sample.begin)
                data = memoryview(file.read(until - sample.begin))
                fault = _image_fault(Sample(url, sample.begin, data, row, key_hash(sample.key)))
                if fault:
                    yield f"{where}: .{sample.image} cannot be {fault}"
        if found != end - first:
            yield f"{url}: {found} samples, the index says {end - first}"
        if tar.data_end != int(index.data_end[number]):
            yield f"{url}: its data ends at byte {tar.data_end}, the index says {int(index.data_end[number])}"


def _recorded_labels(index: IndexFile, row: int) -> list[int]:
    begin, end = row, row + 1
    if index.label_starts is not None:
        begin, end = int(index.label_starts[row]), int(index.label_starts[row + 1])
    return [int(label) for label in index.labels[begin:end]]


def _image_fault(sample: Sample) -> str | None:
    """The error of training's own reader or decoder; None where training would get the image."""
    try:
        _, data = sample.image()
        decode(data, 3)
    except ChunkError as error:
        return f"read: {error}"
    except UnreadableImage as error:
        return f"decoded: {error}"
    return None
