"""A data set → shards: shuffled globally before it is sharded, the index written along with the shards."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pretrain import files
from pretrain.console import printable, say
from pretrain.datasets.dataset import Dataset, UnreadableFile
from pretrain.errors import InputError
from pretrain.hashing import SHARDS, hash_words
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME, LARGEST_SHARD, digest_text
from pretrain.index.tar import BLOCK
from pretrain.progress import Progress
from pretrain.shards.indexwriter import ShardColumns, ShardEntry, write_index
from pretrain.storage.location import local_path
from pretrain.workers import in_threads

RECIPE_NAME = "build.json"  # what the shards were made of; it is there once they are complete
_UNFINISHED = f".{RECIPE_NAME}.partial"  # its name until then: shards beside it are of an interrupted build
UNREADABLE_NAME = "unreadable.txt"
_UNREADABLE_SHOWN = 10
_SHARD_NAME = "shard-{:06d}.tar"

# What differs, where two hashes would say nothing.
_DIFFERENCES = {
    "fingerprint": "its images or labels differ",
    "files": "files of the source are not those it was built from: their sizes or times differ",
}


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
    layout give the same bytes. A folder that holds just this is left as it is (the files of an image folder are known
    by name, size and time); an interrupted build starts again. Memory holds the row numbers and the images read ahead.

    All files that cannot be read are listed in `unreadable.txt`; `skip_unreadable` leaves them out.

    Raises InputError for a folder that holds other shards, files that cannot be read, a full disk; a failed build
    leaves nothing behind but that list.
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
                files.write_text(listing, "".join(f"{line}\n" for line in lines))
                if not (skip_unreadable and entries):
                    raise InputError(_unreadable_text(data, lines, listing))
            write_index(path / INDEX_NAME, entries, data.classes)
    except OSError as error:
        raise files.failure(path, error) from error
    return path / INDEX_NAME, True


@contextlib.contextmanager
def _unfinished(folder: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Marks a folder as being written by this process; afterwards it is marked as built, or cleared after an error.

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
    """The shards' entries, and what is wrong with which rows. Without `skip_unreadable` the first such row ends the
    writing, and the others are only read.
    """
    unreadable: dict[int, str] = {}
    rows = shuffled_rows(len(data), layout.seed)
    width = max(8, len(str(len(data) - 1)))

    def samples() -> Iterator[_Sample]:
        with (
            Progress("writing", "samples", len(data)) as progress,
            contextlib.closing(in_threads(lambda row, _: _read(data, row), rows, readers)) as images,
        ):
            for row, image in zip(rows, images, strict=True):
                if isinstance(image, str):
                    if not unreadable and not skip_unreadable:
                        say(f"note: {image}; looking for others, nothing is written", to=sys.stderr)
                    unreadable[row] = image
                elif skip_unreadable or not unreadable:
                    labels = data.labels_of(row)
                    text = ("json", json.dumps(labels)) if data.starts is not None else ("cls", str(labels[0]))
                    yield _Sample(f"{row:0{width}d}", {image[0]: image[1], text[0]: text[1].encode()}, labels)
                progress.advance()

    entries = [
        _write_shard(folder / _SHARD_NAME.format(number), map(itemgetter(1), group), data.starts is not None)
        for number, group in groupby(_numbered(samples(), layout), key=itemgetter(0))
    ]
    return entries, unreadable


def _read(data: Dataset, row: int) -> tuple[str, bytes] | str:
    """(suffix, image), or what is wrong with the file."""
    try:
        return data.read(row)
    except UnreadableFile as error:
        return printable(str(error))  # the error itself would keep the file's bytes


@dataclass(frozen=True)
class _Sample:
    key: str
    members: dict[str, bytes]
    labels: list[int]

    @property
    def size(self) -> int:
        """Bytes in a tar: a header and padding for each member."""
        return sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in self.members.values())


def _numbered(samples: Iterable[_Sample], layout: ShardLayout) -> Iterator[tuple[int, _Sample]]:
    """Each sample with the number of its shard."""
    number = count = size = 0
    for sample in samples:
        if count and (count == layout.samples or size + sample.size > layout.bytes):
            number, count, size = number + 1, 0, 0
        count, size = count + 1, size + sample.size
        yield number, sample


def _write_shard(path: Path, samples: Iterable[_Sample], lists: bool) -> ShardEntry:
    # It brings torch, two seconds that a folder which holds its shards already need not wait.
    from webdataset.writer import TarWriter

    columns = ShardColumns()
    with files.atomic_write(path) as file:
        hashed = _HashedFile(file)
        # Nothing of when, where or by whom: the same samples are the same bytes.
        with TarWriter(hashed, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
            for sample in samples:
                # The stream buffers: the file's own position lags.
                columns.add(int(tar.tarstream.offset), sample.key, sample.labels)
                tar.write({"__key__": sample.key, **sample.members})
            data_end = int(tar.tarstream.offset)
        size = file.tell()
    digest = digest_text(hashed.digest.hexdigest())
    return columns.entry(path.name, bytes=size, data_end=data_end, digest=digest, lists=lists)


class _HashedFile:
    """A file to write whose sha256 is computed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


def _unreadable_text(data: Dataset, lines: list[str], listing: Path) -> str:
    shown = lines[:_UNREADABLE_SHOWN]
    more = [f"and {len(lines) - len(shown):,} more"] if len(lines) > len(shown) else []
    mend = "mend or remove them" + (", or leave them out: --skip-unreadable" if len(lines) < len(data) else "")
    counted = f"{data.name}: {len(lines):,} of {len(data):,} images cannot be read"
    return "\n".join([counted, *shown, *more, f"{listing} lists them all; {mend}"])


def unreadable_note(folder: Path) -> str:
    """What a build left out of the shards in `folder`; empty where it left out nothing."""
    listing = folder / UNREADABLE_NAME
    if not files.exists(listing):
        return ""
    return f"without {len(listing.read_bytes().splitlines()):,} files that cannot be read: {listing}"


def shuffled_rows(rows: int, seed: int) -> array[int]:
    """0 … rows−1 in the order in which they are written: by a keyed hash, ties by row."""
    return array("q", np.argsort(hash_words(SHARDS, seed, np.arange(rows, dtype=np.uint64)), kind="stable").tobytes())


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
    """Whether `folder` holds just this data set, complete. Raises InputError when it holds another."""
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
        differences = [
            _DIFFERENCES.get(key) or f"{key} is {found.get(key)!r}, asked for {recipe[key]!r}"
            for key in recipe
            if key != "source" and found.get(key) != recipe[key]  # an image folder may have been renamed
        ]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder / RECIPE_NAME}: not a build's record ({error}); choose an empty folder") from error
    if differences:
        raise InputError(
            f"{folder}: holds another data set ({', '.join(differences)}); choose another folder, or remove this one"
        )
    return files.exists(folder / INDEX_NAME)


def _clear(folder: Path, *kept: str) -> None:
    """Remove what an interrupted build left behind, the list of unreadable files too."""
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
