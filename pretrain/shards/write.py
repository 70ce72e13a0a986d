"""A data set → shards: shuffled globally before it is sharded, the index written along with the shards."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pretrain import files
from pretrain.console import printable, say
from pretrain.datasets.dataset import Dataset, UnreadableFile
from pretrain.errors import InputError
from pretrain.hashing import SHARDS, hash_words
from pretrain.index.content import digest_text
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME, LARGEST_SHARD, key_hash
from pretrain.index.tar import BLOCK
from pretrain.progress import Progress
from pretrain.shards.indexwriter import ShardEntry, write_index
from pretrain.storage.location import local_path

RECIPE_NAME = "build.json"  # what the shards were made of; it is there once they are whole
_UNFINISHED = f".{RECIPE_NAME}.partial"  # its name until then: shards beside it are of a build that was cut off
UNREADABLE_NAME = "unreadable.txt"
_UNREADABLE_SHOWN = 10
_SHARD_NAME = "shard-{:06d}.tar"
_READ_AHEAD = 4  # images a reading thread may be ahead of the writer

# What differs, where two hashes would say nothing.
_DIFFERENCES = {
    "fingerprint": "its images or labels differ",
    "files": "files of the source are not those it was built from: their sizes or times differ",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class ShardLayout:
    """How rows become shards: shuffled by `seed`, at most `samples` and about `bytes` to a shard."""

    seed: int = 0
    bytes: int = 256 << 20
    samples: int = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"shards: seed {self.seed}; 0 … 2^63 - 1 would be right")
        if not self.samples >= 1:
            raise InputError(f"shards: {self.samples} samples a shard; at least 1 would be right")
        if not 1 <= self.bytes <= LARGEST_SHARD // 2:
            raise InputError(f"shards: {self.bytes} bytes a shard; 1 … {LARGEST_SHARD // 2} would be right")


def write_shards(
    data: Dataset,
    folder: str | Path,
    layout: ShardLayout | None = None,
    *,
    readers: int = 8,
    skip_unreadable: bool = False,
) -> tuple[Path, bool]:
    """Write `data` as shards with their index; returns (the index's path, whether anything was written).

    Keys are row numbers; a sample holds the image and `.cls` or, where labels are lists, `.json`. The same data and
    layout give the same bytes. A folder that holds just this is left as it is (the files of a folder of images are
    known by name, size and time); one where this was cut off is begun again. Memory is bounded by the row numbers and
    the images being read ahead.

    Files that cannot be read are listed in `unreadable.txt`, all of them; they are left out with `skip_unreadable`.

    Raises InputError for a folder that holds other shards, files that cannot be read, a disk that is full; nothing is
    left of a build that failed, but for that list.
    """
    layout = layout or ShardLayout()
    path = local_path(folder)
    listing = path / UNREADABLE_NAME
    recipe = _recipe(data, layout)
    if _holds(path, recipe):
        if files.exists(listing) and not skip_unreadable:
            raise InputError(f"{path}: holds this without the files in {listing}; --skip-unreadable takes it so")
        Index.open(path).check_files()
        return path / INDEX_NAME, False
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _unfinished(path, recipe):
            entries, unreadable = _write(data, path, layout, readers, skip_unreadable)
            if unreadable:
                lines = [unreadable[row] for row in sorted(unreadable)]
                _write_durably(listing, "".join(f"{line}\n" for line in lines).encode())
                if not (skip_unreadable and entries):
                    raise InputError(_unreadable_text(data, lines, listing))
            files.flush(path)
            write_index(path / INDEX_NAME, entries, data.classes)
    except OSError as error:
        raise files.failure(path, error) from error
    return path / INDEX_NAME, True


@contextlib.contextmanager
def _unfinished(folder: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Marks a folder as one that this process writes: as built afterwards, or nothing is left of it.

    Raises InputError while another process writes there.
    """
    marker = folder / _UNFINISHED
    with open(marker, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another build writes here; wait for it, or choose another folder") from None
        except OSError:  # a file system without locks
            pass
        if not (files.exists(marker) and os.path.samestat(os.fstat(file.fileno()), marker.stat())):
            raise InputError(f"{folder}: another build has just ended here; run this again")
        try:
            file.truncate(0)
            file.write((json.dumps(recipe, indent=1) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            files.flush(folder)
            _clear(folder)
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                _clear(folder, *([UNREADABLE_NAME] if isinstance(error, InputError) else []))
                marker.unlink(missing_ok=True)
            raise
        os.replace(marker, folder / RECIPE_NAME)
        files.flush(folder)


def _write(
    data: Dataset, folder: Path, layout: ShardLayout, readers: int, skip_unreadable: bool
) -> tuple[list[ShardEntry], dict[int, str]]:
    """The shards' entries, and what is wrong with which rows; without `skip_unreadable` only these count once there
    is one.
    """

    def read(row: int) -> tuple[str, bytes] | str:
        try:
            return data.read(row)
        except UnreadableFile as error:
            return printable(str(error))  # the error itself would keep the file's bytes

    unreadable: dict[int, str] = {}
    width = max(8, len(str(len(data) - 1)))
    rows = shuffled_rows(len(data), layout.seed)
    with _ShardSequence(folder, layout) as writer, Progress("writing", "samples", len(data)) as progress:
        for row, found in zip(rows, _ahead(read, rows, readers), strict=True):
            if isinstance(found, str):
                if not unreadable and not skip_unreadable:
                    say(f"note: {found}; looking for others, nothing is written", to=sys.stderr)
                unreadable[row] = found
            elif skip_unreadable or not unreadable:
                suffix, image = found
                writer.add(f"{row:0{width}d}", suffix, image, data.labels_of(row), data.starts is not None)
            progress.advance()
        return writer.finish(), unreadable


def _unreadable_text(data: Dataset, lines: list[str], listing: Path) -> str:
    shown = lines[:_UNREADABLE_SHOWN]
    more = [f"and {len(lines) - len(shown):,} more"] if len(lines) > len(shown) else []
    mend = "mend or remove them" + (", or leave them out: --skip-unreadable" if len(lines) < len(data) else "")
    counted = f"{data.name}: {len(lines):,} of {len(data):,} images cannot be read"
    return "\n".join([counted, *shown, *more, f"{listing} lists them all; {mend}"])


def shuffled_rows(rows: int, seed: int) -> array[int]:
    """0 … rows−1 in the order in which they are written: by a keyed hash, ties by row."""
    return array("q", np.argsort(hash_words(SHARDS, seed, np.arange(rows, dtype=np.uint64)), kind="stable").tobytes())


class _ShardSequence:
    """Shards being written one after another, each under a temporary name until it is whole and on disk."""

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._entries: list[ShardEntry] = []
        self._shard: _OpenShard | None = None

    def add(self, key: str, suffix: str, image: bytes, labels: list[int], lists: bool) -> None:
        label = ("json", json.dumps(labels)) if lists else ("cls", str(labels[0]))
        members = {suffix: image, label[0]: label[1].encode()}
        size = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in members.values())
        if self._shard is not None and (
            len(self._shard.offsets) >= self._layout.samples or self._shard.tell() + size > self._layout.bytes
        ):
            self._finish_shard()
        if self._shard is None:
            self._shard = _OpenShard(self._folder / _SHARD_NAME.format(len(self._entries)), lists)
        self._shard.add(key, members, labels)

    def finish(self) -> list[ShardEntry]:
        self._finish_shard()
        return self._entries

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.finish())
            self._shard = None

    def __enter__(self) -> _ShardSequence:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shard is not None:
            self._shard.abandon()


class _OpenShard:
    def __init__(self, path: Path, lists: bool) -> None:
        # It brings torch, two seconds that a folder which holds its shards already need not wait.
        from webdataset.writer import TarWriter

        self._path = path
        self._aside = path.with_name(f".{path.name}.partial")
        self._file = open(self._aside, "wb")  # noqa: SIM115 (closed by finish)
        self._digest = hashlib.sha256()
        # Nothing of when, where or by whom: the same samples are the same bytes.
        self._tar = TarWriter(self, encoder=False, user="", group="", mode=0o644, mtime=0)
        self._lists = lists
        self.offsets = array("I")
        self._hashes, self._labels, self._counts = array("I"), array("i"), array("I")

    def write(self, data: bytes) -> int:
        """The tar's bytes on their way to the file."""
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Where the next sample begins (the tar stream buffers: the file's own position lags)."""
        return int(self._tar.tarstream.offset)

    def add(self, key: str, members: dict[str, bytes], labels: list[int]) -> None:
        self.offsets.append(self.tell() // BLOCK)
        self._hashes.append(key_hash(key))
        self._labels.extend(labels)
        self._counts.append(len(labels))
        self._tar.write({"__key__": key, **members})

    def abandon(self) -> None:
        """Leave nothing behind."""
        for close in (self._tar.close, self._file.close):
            with contextlib.suppress(OSError):  # a disk that is full has no room for what is still to be written
                close()
        self._aside.unlink(missing_ok=True)

    def finish(self) -> ShardEntry:
        data_end = self.tell()
        self._tar.close()
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self._path)
        return ShardEntry(
            url=self._path.name,
            bytes=size,
            data_end=data_end,
            offsets=np.array(self.offsets, np.uint32),
            key_hashes=np.array(self._hashes, np.uint32),
            labels=np.array(self._labels, np.int32),
            label_counts=np.array(self._counts, np.uint32) if self._lists else None,
            digest=digest_text(self._digest.hexdigest()),
        )


def _ahead(read: Callable[[int], Result], rows: Iterable[int], threads: int) -> Iterator[Result]:
    """`read` of every row, in order, by threads that stay a bounded number of rows ahead."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for row in rows:
                pending.append(pool.submit(read, row))
                if len(pending) >= threads * _READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _recipe(data: Dataset, layout: ShardLayout) -> dict[str, Any]:
    return {
        "source": data.name,
        "split": data.split,
        "samples": len(data),
        "fingerprint": data.fingerprint,
        **({"files": data.files} if data.files else {}),
        "seed": layout.seed,
        "shard_bytes": layout.bytes,
        "shard_samples": layout.samples,
        "version": 1,
    }


def _holds(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` holds just this data set, whole. Raises InputError when it holds another."""
    if files.exists(folder) and not files.is_folder(folder):
        raise InputError(f"{folder}: is a file; shards go into a folder")
    if not files.exists(folder) or files.exists(folder / _UNFINISHED):
        return False
    if not files.exists(folder / RECIPE_NAME):
        other = next((name for name in sorted(os.listdir(folder)) if name.endswith((".tar", ".vfi"))), None)
        if other:
            raise InputError(f"{folder}: holds shards already ({other}); choose an empty folder")
        return False
    try:
        found = json.loads((folder / RECIPE_NAME).read_text())
        # An earlier version's record knows files of the source by name alone.
        earlier = {"fingerprint", "files"} if recipe.get("files") and not found.get("files") else set()
        differences = [
            _DIFFERENCES.get(key) or f"{key} is {found.get(key)!r}, asked for {recipe[key]!r}"
            for key in recipe
            # A folder of images may have been renamed.
            if key not in {"source", *earlier} and found.get(key) != recipe[key]
        ]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder / RECIPE_NAME}: not a build's record ({error}); choose an empty folder") from error
    if differences:
        raise InputError(
            f"{folder}: holds another data set ({', '.join(differences)}); choose another folder, or remove this one"
        )
    whole = files.exists(folder / INDEX_NAME)
    if whole and earlier:
        raise InputError(
            f"{folder}: was built by an earlier version, whose record ({RECIPE_NAME}) does not tell whether the files "
            "of the source are still those; choose another folder, or remove this one"
        )
    return whole


def _clear(folder: Path, *kept: str) -> None:
    """Remove what a build that was cut off left behind, the list of unreadable files too."""
    for pattern in (
        RECIPE_NAME,
        INDEX_NAME,
        f".{INDEX_NAME}.*.partial",
        "shard-*.tar",
        ".shard-*.partial",
        UNREADABLE_NAME,
    ):
        for left in folder.glob(pattern):
            if left.name not in kept:
                left.unlink()


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    files.flush(path.parent)
