"""Writing an index: one shard after another; their columns wait in temporary files beside it."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import files
from pretrain.errors import InputError
from pretrain.index.indexfile import ALIGN, VERSION, Pieces, content_hash, key_hash, place_arrays, sequence_hash
from pretrain.index.tar import BLOCK
from pretrain.shards.column import Column


@dataclass(frozen=True)
class ShardEntry:
    """What the index records of one shard of n samples.

    `url` is as stored (relative to the index's folder where local); `offsets` (in blocks) and `key_hashes` are uint32
    [n]; `labels` is int32 [n] or, with `label_counts` uint32 [n], the lists one after the other.
    """

    url: str
    bytes: int
    data_end: int
    offsets: np.ndarray
    key_hashes: np.ndarray
    labels: np.ndarray
    label_counts: np.ndarray | None = None
    digest: str = ""

    @property
    def samples(self) -> int:
        return len(self.offsets)

    def counts(self) -> np.ndarray:
        """Labels per sample, uint32 [n]."""
        return np.ones(self.samples, np.uint32) if self.label_counts is None else self.label_counts


class ShardColumns:
    """The columns of one shard, which grow sample by sample."""

    def __init__(self) -> None:
        self._offsets, self._hashes = array("I"), array("I")
        self._labels, self._counts = array("i"), array("I")

    def add(self, begin: int, key: str, labels: Sequence[int]) -> None:
        """The next sample; `begin` is the byte of its first header."""
        self._offsets.append(begin // BLOCK)
        self._hashes.append(key_hash(key))
        self._labels.extend(labels)
        self._counts.append(len(labels))

    def entry(self, url: str, *, bytes: int, data_end: int, digest: str, lists: bool) -> ShardEntry:
        """The shard's entry; `lists` tells whether labels are lists."""
        return ShardEntry(
            url=url,
            bytes=bytes,
            data_end=data_end,
            offsets=np.array(self._offsets, np.uint32),
            key_hashes=np.array(self._hashes, np.uint32),
            labels=np.array(self._labels, np.int32),
            label_counts=np.array(self._counts, np.uint32) if lists else None,
            digest=digest,
        )


def write_index(path: Path, entries: Sequence[ShardEntry], classes: Sequence[str] | None = None) -> str:
    """Write the index of `entries`, in that order, to `path`; returns its hash.

    Raises InputError when there are no samples or `path` is not writable.
    """
    with IndexWriter(path) as writer:
        for entry in entries:
            writer.add(entry)
        return writer.finish(classes)


class IndexWriter:
    """Takes shards in order and finally writes their index to `path`, atomically. A context manager.

    Temporary files take 16 bytes a sample (and 4 a label); memory does not grow with the samples. Raises InputError
    when there are no samples or `path` is not writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._urls: list[str] = []
        self._digests: list[str] = []
        self._table: list[tuple[int, int, int]] = []  # samples, bytes, data_end
        self._lists = False
        self._longest = 0
        self._num_classes = 0
        dtypes = {"offsets": "<u4", "key_hashes": "<u4", "labels": "<i4", "counts": "<u4"}
        self._columns = {name: Column(dtype, path.parent) for name, dtype in dtypes.items()}

    def add(self, entry: ShardEntry) -> None:
        """The next shard."""
        self._urls.append(entry.url)
        self._digests.append(entry.digest)
        self._table.append((entry.samples, entry.bytes, entry.data_end))
        self._lists = self._lists or entry.label_counts is not None
        counts = entry.counts()
        self._longest = max(self._longest, int(counts.max(initial=0)))
        self._num_classes = max(self._num_classes, int(entry.labels.max(initial=-1)) + 1)
        parts = {"offsets": entry.offsets, "key_hashes": entry.key_hashes, "labels": entry.labels, "counts": counts}
        for name, part in parts.items():
            self._columns[name].append(part)

    @property
    def offsets(self) -> np.ndarray:
        """Where the samples so far begin in their shards, in blocks of 512 bytes, uint32 [n]."""
        return self._columns["offsets"].array()

    def sequence(self) -> str:
        """The hash of the samples' sequence so far."""
        shard_samples = np.array([samples for samples, _, _ in self._table], np.int64)
        offsets, keys, labels, counts = (
            self._columns[name].pieces() for name in ("offsets", "key_hashes", "labels", "counts")
        )
        return sequence_hash(shard_samples, offsets, keys, counts if self._lists else None, labels)

    def finish(self, classes: Sequence[str] | None = None) -> str:
        """Write the index; returns its hash."""
        table = np.array(self._table, "<i8").reshape(-1, 3)
        samples, flat = int(table[:, 0].sum()), len(self._columns["labels"])
        if not samples:
            raise InputError(f"{self._path}: no samples to index")
        columns: dict[str, tuple[str, int, Pieces]] = {
            "first": ("<i8", len(table) + 1, [_running(table[:, 0])]),
            "shard_bytes": ("<i8", len(table), [table[:, 1]]),
            "data_end": ("<i8", len(table), [table[:, 2]]),
            **_strings("url_ends", "urls", self._urls),
            **_strings("digest_ends", "digests", self._digests),
            "offsets": ("<u4", samples, self._columns["offsets"].pieces()),
            "key_hashes": ("<u4", samples, self._columns["key_hashes"].pieces()),
            "labels": ("<i4", flat, self._columns["labels"].pieces()),
        }
        if self._lists:
            columns["label_starts"] = ("<u4" if flat < 1 << 32 else "<i8", samples + 1, self._starts())
        sequence = self.sequence()
        header = {
            "version": VERSION,
            "samples": samples,
            "shards": len(table),
            "num_classes": self._num_classes,
            "multilabel": self._lists,
            "longest": self._longest if self._lists else 1,
            "classes": None if classes is None else list(classes),
            "sequence": sequence,
            "hash": content_hash(sequence, self._digests),
        }
        self._save(header, columns)
        return str(header["hash"])

    def _save(self, header: dict[str, Any], columns: dict[str, tuple[str, int, Pieces]]) -> None:
        start, _ = place_arrays(header, {name: (dtype, length) for name, (dtype, length, _) in columns.items()})
        try:
            with files.atomic_write(self._path) as file:
                file.write(start)
                for dtype, _, pieces in columns.values():
                    for piece in pieces:
                        file.write(np.ascontiguousarray(piece, dtype).data)
                    file.write(bytes(-file.tell() % ALIGN))
        except OSError as error:
            raise files.failure(self._path, error) from error

    def _starts(self) -> Iterator[np.ndarray]:
        total = 0
        yield np.zeros(1, np.int64)
        for counts in self._columns["counts"].pieces():
            starts = total + np.cumsum(counts, dtype=np.int64)
            total = int(starts[-1])
            yield starts

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for column in self._columns.values():
            column.close()


def _running(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _strings(ends: str, text: str, strings: Sequence[str]) -> dict[str, tuple[str, int, Pieces]]:
    encoded = [os.fsencode(string) for string in strings]
    blob = b"".join(encoded)
    return {
        ends: ("<i8", len(strings) + 1, [_running(np.array([len(part) for part in encoded]))]),
        text: ("|u1", len(blob), [np.frombuffer(blob, np.uint8)]),
    }
