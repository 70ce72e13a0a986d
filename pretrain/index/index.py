"""The index: how many samples there are, in which shard each lies, and what it is labelled."""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain import files
from pretrain.errors import InputError, StorageError
from pretrain.index.compare import check_classes, refuse_shared
from pretrain.index.indexfile import IndexFile, count_kinds, etag_of, index_path, unhashed_text
from pretrain.index.tar import BLOCK
from pretrain.storage.retry import Timeouts
from pretrain.storage.store import Extent, Stat, is_remote, stat
from pretrain.workers import in_threads

_ASKED_AT_ONCE = 32


@dataclass(frozen=True)
class SampleExtent(Extent):
    """Bytes of one shard that hold exactly the samples [first_id, first_id + count)."""

    first_id: int = 0
    count: int = 0


@dataclass(frozen=True)
class Shard:
    """A row of the shard table. `data_end` is the byte of the end-of-archive marker; `digest` may be empty."""

    url: str
    samples: int
    bytes: int
    data_end: int
    first_id: int
    digest: str


class Index:
    """One index file, or several concatenated without copying: canonical ids continue from one to the next.

    Everything stays in the files' mapped pages, which the ranks of a node share; lookups are vectorised.
    """

    def __init__(self, files: Sequence[IndexFile]) -> None:
        self._files = tuple(files)
        # Canonical id and shard number each file starts at; last entry: the totals.
        self._first = np.cumsum([0, *(file.samples for file in files)], dtype=np.int64)
        self._first_shard = np.cumsum([0, *(file.num_shards for file in files)], dtype=np.int64)

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path]) -> Index:
        """Open an index file, a folder of shards that holds one (`index.vfi`), or a list of either.

        Raises InputError for a folder without an index (with the command that makes it), for a file that is missing,
        truncated or no index, and for one that numbers the classes otherwise.
        """
        several = [paths] if isinstance(paths, str | Path) else list(paths)
        if not several:
            raise InputError("no index given; an INDEX is an index file, or a folder of shards that holds one")
        files = [IndexFile(index_path(path)) for path in several]
        named = [file for file in files if file.classes]
        for file in named[1:]:
            check_classes(named[0].classes, file.classes, str(named[0].path), str(file.path))
        return cls(files)

    @property
    def files(self) -> tuple[IndexFile, ...]:
        """The index files, in order."""
        return self._files

    @property
    def samples(self) -> int:
        """N: canonical ids are 0 … N−1."""
        return int(self._first[-1])

    @property
    def bytes(self) -> int:
        """Bytes of all samples in the shards: with headers and labels, without the ends of archives."""
        return sum(int(file.data_end.sum()) for file in self._files)

    @property
    def hash(self) -> str:
        """sha256 (hex) of the samples' sequence and of the shards' content as far as that is recorded."""
        return _joined([file.hash for file in self._files])

    @property
    def sequence(self) -> str:
        """sha256 (hex) of the samples' sequence alone (keys, labels, offsets); `hash` where no content is recorded."""
        return _joined([file.sequence for file in self._files])

    @property
    def content(self) -> dict[str, int]:
        """For how many shards each kind of digest is recorded: {"sha256", "etag", "unknown"}."""
        return count_kinds(digest for file in self._files for digest in file.digests())

    def unhashed(self) -> str:
        """What the hash does not cover of the shards' content, in words; empty where it has the sha256 of each."""
        return unhashed_text(self.content)

    @property
    def num_classes(self) -> int:
        """The largest label that occurs, plus 1."""
        return max(file.num_classes for file in self._files)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, where a file has them: the same in every file that does."""
        return next((file.classes for file in self._files if file.classes), None)

    @property
    def multilabel(self) -> bool:
        """Whether labels are lists."""
        return any(file.multilabel for file in self._files)

    @property
    def one_label(self) -> bool:
        """Whether every sample has exactly one label, in a list or not."""
        return all(file.longest == 1 and len(file.labels) == file.samples for file in self._files)

    @property
    def unlabelled(self) -> int:
        """How many samples have no label: an empty list. Reads the lengths of all lists."""
        counts = (np.diff(part) for file in self._files if file.multilabel for part in file.pieces("label_starts", 1))
        return sum(int((count == 0).sum()) for count in counts)

    @property
    def longest(self) -> int:
        """L: the most labels that one sample has (1 for single labels)."""
        return max(file.longest for file in self._files)

    @property
    def shards(self) -> ShardTable:
        """The shard table, a sequence of `Shard`."""
        return ShardTable(self._files, self._first, self._first_shard)

    def labels(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Labels of canonical ids [n] → int64 [n, L], padded with −1. Raises IndexError for an id outside [0, N)."""
        ids = self._checked(ids)
        labels = np.full((len(ids), self.longest), -1, np.int64)
        for file, rows, local in self._by_file(ids):
            if file.label_starts is None:
                labels[rows, 0] = file.labels[local]
                continue
            starts = file.label_starts[local].astype(np.int64)
            counts = file.label_starts[local + 1].astype(np.int64) - starts
            columns = np.arange(file.longest)
            taken = columns < counts[:, None]
            padded = np.full((len(local), file.longest), -1, np.int64)
            padded[taken] = file.labels[(starts[:, None] + columns)[taken]]
            labels[rows, : file.longest] = padded
        return labels

    def key_hash(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """crc32 of the keys (UTF-8) of canonical ids [n] → uint32 [n]. Raises IndexError for an id outside [0, N)."""
        ids = self._checked(ids)
        hashes = np.empty(len(ids), np.uint32)
        for file, rows, local in self._by_file(ids):
            hashes[rows] = file.key_hashes[local]
        return hashes

    def extents(self, ids: np.ndarray | Sequence[int]) -> list[SampleExtent]:
        """Byte ranges that hold canonical ids [n]: one for each run u, u+1, u+2, …, split at shard borders.

        Raises IndexError for an id outside [0, N).
        """
        # Plain integers here and below: runs are short, and a call of numpy is long.
        return [extent for run in _runs(self._checked(ids).tolist()) for extent in self._run(*run)]

    def _run(self, first: int, last: int) -> Iterator[SampleExtent]:
        """The byte ranges of ids first, first + 1, … last."""
        while first <= last:
            part = bisect.bisect_right(self._first, first) - 1
            file, origin = self._files[part], int(self._first[part])
            begin = first - origin
            shard = bisect.bisect_right(file.first, begin) - 1
            border = int(file.first[shard + 1])
            end = min(last + 1 - origin, border)
            until = int(file.data_end[shard]) if end == border else int(file.offsets[end]) * BLOCK
            start, size = int(file.offsets[begin]) * BLOCK, int(file.shard_bytes[shard])
            if not start <= until <= size:  # before that much memory is allocated
                raise InputError(
                    f"{file.path}: damaged: ids {first} to {first + end - begin - 1} in bytes {start}-{until}"
                )
            yield SampleExtent(file.shard_url(shard), start, until, file.etag(shard), size, first, end - begin)
            first = origin + end

    def borders(self, extent: SampleExtent) -> tuple[list[int], list[int]]:
        """Where each sample begins in the shard, and the extent's end [count + 1]; crc32 of the keys [count]."""
        part = bisect.bisect_right(self._first, extent.first_id) - 1
        begin = extent.first_id - int(self._first[part])
        rows = slice(begin, begin + extent.count)
        starts = [block * BLOCK for block in self._files[part].offsets[rows].tolist()]
        return [*starts, extent.end], self._files[part].key_hashes[rows].tolist()

    def histogram(self) -> np.ndarray:
        """How often each class occurs, int64 [num_classes]."""
        counts = np.zeros(self.num_classes, np.int64)
        for file in self._files:
            for piece in file.pieces("labels"):
                counts += np.bincount(piece, minlength=len(counts))
        return counts

    def check_files(
        self, *, local: int | None = None, remote: int | None = None, timeouts: Timeouts | None = None
    ) -> None:
        """Compare every shard's size, of a remote one also its etag, with what is recorded; reads no data.

        `local`, `remote`: check only that many shards of each kind, spread over the index. Raises InputError naming
        the first shard that is missing or different; StorageError where storage does not answer for now.
        """
        shards = self.shards
        rows: tuple[list[int], list[int]] = ([], [])
        for row, url in enumerate(shards.urls()):
            rows[is_remote(url)].append(row)

        def first_fault(block: Sequence[int], stop: threading.Event) -> InputError | None:
            return next((fault for row in block if (fault := _shard_fault(shards[row], stop, timeouts))), None)

        blocks = [*_blocks(_spread(rows[0], local), 64), *_blocks(_spread(rows[1], remote), 4)]
        with closing(in_threads(first_fault, blocks, _ASKED_AT_ONCE)) as faults:
            fault = next((fault for fault in faults if fault), None)
        if fault:
            raise fault

    def check_distinct(self) -> None:
        """Raise InputError where two files hold the same samples, all or some: they would come twice an epoch."""
        refuse_shared(self._files)

    def check_content(self) -> None:
        """Hash everything that fixes the sequence of samples, and compare with what the files say; reads all of it.

        Raises InputError naming the first file that is damaged: a flipped bit is another label, and only this shows it.
        """
        for file in self._files:
            file.check_content()

    def _checked(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        array = np.asarray(ids)
        if array.size == 0:
            return np.zeros(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise IndexError(f"ids are integers in one dimension, not {array.dtype} {array.shape}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.samples:
            raise IndexError(f"id {low if low < 0 else high} is outside 0 … {self.samples - 1}")
        return array.astype(np.int64, copy=False)

    def _by_file(self, ids: np.ndarray) -> Iterator[tuple[IndexFile, np.ndarray | slice, np.ndarray]]:
        """Of each file: it, the rows of `ids` that it holds, and the ids counted from its first."""
        if len(self._files) == 1:
            yield self._files[0], slice(None), ids
            return
        part = np.searchsorted(self._first, ids, side="right") - 1
        for number in np.unique(part).tolist():
            rows = np.flatnonzero(part == number)
            yield self._files[number], rows, ids[rows] - self._first[number]


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last id of each run u, u+1, u+2, …"""
    begin = 0
    for at, sample_id in enumerate(ids):
        if at + 1 == len(ids) or ids[at + 1] != sample_id + 1:
            yield ids[begin], sample_id
            begin = at + 1


def _joined(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


class ShardTable(Sequence[Shard]):
    """The shards of an index in order; a row is made when it is asked for."""

    def __init__(self, files: Sequence[IndexFile], first: np.ndarray, first_shard: np.ndarray) -> None:
        self._files, self._first, self._first_shard = files, first, first_shard

    def __len__(self) -> int:
        return int(self._first_shard[-1])

    def urls(self) -> Iterator[str]:
        """The URL or path of each."""
        return (file.shard_url(number) for file in self._files for number in range(file.num_shards))

    def __getitem__(self, row: int) -> Shard:  # type: ignore[override]
        if not 0 <= row < len(self):
            raise IndexError(f"shard {row} is outside 0 … {len(self) - 1}")
        part = int(np.searchsorted(self._first_shard, row, side="right")) - 1
        file, number = self._files[part], row - int(self._first_shard[part])
        first, end = int(file.first[number]), int(file.first[number + 1])
        return Shard(
            url=file.shard_url(number),
            samples=end - first,
            bytes=int(file.shard_bytes[number]),
            data_end=int(file.data_end[number]),
            first_id=int(self._first[part]) + first,
            digest=file.digest(number),
        )


def _spread(rows: Sequence[int], most: int | None) -> Sequence[int]:
    """`most` of `rows`, evenly spread from the first to the last."""
    if most is None or most >= len(rows):
        return rows
    return [rows[number] for number in np.linspace(0, len(rows) - 1, most).round().astype(int).tolist()]


def _blocks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _shard_fault(shard: Shard, stop: threading.Event, timeouts: Timeouts | None) -> InputError | None:
    """What is wrong with a shard's size or etag; None for nothing."""
    remote = is_remote(shard.url)
    try:
        found = stat(shard.url, timeouts, stop) if remote else Stat(os.stat(shard.url).st_size, "")
    except (FileNotFoundError, NotADirectoryError) as error:
        return InputError(
            f"{shard.url}: {error.strerror}, but the index lists it; restore it, or index those there are"
        )
    except OSError as error:
        return files.failure(shard.url, error)
    except StorageError as error:
        return error
    except InputError as error:
        return InputError(f"{error}; but the index lists it")
    recorded = Stat(shard.bytes, etag_of(shard.digest))
    difference = recorded.difference(found)
    if difference is None:
        return None
    if found.size != shard.bytes:
        difference = f"{found.size} bytes, the index says {shard.bytes}"
    word = "truncated" if found.size < shard.bytes else "changed"
    again = "URLS… --out INDEX" if remote else os.path.dirname(shard.url)
    return InputError(
        f"{shard.url}: {word}: {difference}; rebuild the shard, or index it as it is: python launch/shards.py index "
        f"{again}"
    )
