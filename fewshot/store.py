"""Features in files: a run's own, kept so that a second run need not compute them, and those a user gives."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fewshot.features import IMAGES, again
from pretrain import files
from pretrain.errors import InputError
from pretrain.index.index import Index, Shard
from pretrain.index.indexfile import etag_of
from pretrain.storage.filekind import LOOKED_AT, file_kind
from pretrain.storage.retry import Timeouts
from pretrain.storage.store import is_remote, stat
from pretrain.workers import in_threads

FORMAT = 3  # also to be raised when features of the same weights and images come out differently
_ASKED_AT_ONCE = 32
_GIVEN = ("support_x", "support_y", "query_x", "query_y")
# What numpy raises for a file that is no .npz, is cut off, damaged, encrypted, or holds pickles: zipfile's RuntimeError
# is for a password and for the kinds of archive that it does not read.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    KeyError,
    RuntimeError,
)


@dataclass(frozen=True)
class FeatureSet:
    """Features of one layer: support [n, d] of ascending `support_ids` [n], and query [m, d] in id order."""

    support_ids: NDArray[np.int64]
    support: NDArray[np.floating[Any]]
    query: NDArray[np.floating[Any]]

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """The support features of `ids`, in their order."""
        return self.support[np.searchsorted(self.support_ids, ids)]


@dataclass(frozen=True)
class Given:
    """The features of a user's file. `support_ids` are row numbers; labels are 0 … classes-1."""

    path: Path
    sha256: str
    features: FeatureSet
    support_labels: NDArray[np.int64]
    query_labels: NDArray[np.int64]
    classes: int


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """As `files.atomic_write`, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        yield file


def feature_file(folder: Path, what: Mapping[str, Any]) -> Path:
    """Where features that `what` fixes are kept."""
    text = json.dumps({"format": FORMAT, **what}, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def content(index: Index, ids: NDArray[np.int64] | None = None, timeouts: Timeouts | None = None) -> str:
    """sha256 (hex) of what fixes the images of `ids` (default: all), as far as is known unread.

    The index's hash says what was indexed. Whether a shard is still that: readers compare its etag where one is
    recorded; else what its server calls its content tells, and of a local one `write_times`. Raises InputError where a
    server is asked and has no answer, after `timeouts`.
    """
    digest = hashlib.sha256(index.hash.encode())
    for version in in_threads(lambda shard, _: _version(shard, timeouts), list(index.shards), _ASKED_AT_ONCE):
        digest.update(version.encode())
    digest.update(b"all" if ids is None else ids.astype("<i8").tobytes())
    return digest.hexdigest()


def write_times(index: Index) -> NDArray[np.int64]:
    """When each shard was written to last, in ns, int64 [shards]; 0 for one at a URL, or not in place."""
    times = in_threads(lambda shard, _: _write_time(shard), list(index.shards), _ASKED_AT_ONCE)
    return np.fromiter(times, np.int64)


def kept(path: Path, times: Mapping[str, NDArray[np.int64]]) -> bool:
    """Whether features are in `path` of the shards as they are now, by split and `write_times`.

    A shard that is not in place any more is taken for what it was: it may be gone once the features are taken.
    """
    if not files.is_file(path):
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return all(bool(((now == file[f"{split}_times"]) | (now == 0)).all()) for split, now in times.items())
    except _UNREADABLE:
        return True  # `read_layer` tells of it


def write_features(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as .npz, whole or not at all."""
    save: Callable[..., None] = np.savez  # numpy's releases type its keywords, here the arrays' names, differently
    with whole(path) as file:
        save(file, **arrays)


def read_layer(path: Path, layer: str, where: str) -> FeatureSet:
    """One layer that `write_features` has kept. `where` says in messages whose features they are.

    Raises InputError: the file is damaged, or features are not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = FeatureSet(file["support_ids"], file[f"support_{layer}"], file[f"query_{layer}"])
    except _UNREADABLE as error:
        raise _unreadable(path, "cannot be read", error, "; remove the file to compute them anew") from None
    for split, values in (("support", found.support), ("query", found.query)):
        if lost := _not_finite(values):
            raise InputError(
                f"{where}: {layer} is not finite for {lost} of {len(values)} {split} images; these weights "
                "have diverged, give those of an earlier step"
            )
    return found


def scored_again(path: Path) -> int:
    """How many of the query images that `write_features` kept features of are among the support images.

    Raises InputError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return again(file[f"query_{IMAGES}"], file[f"support_{IMAGES}"])
    except _UNREADABLE as error:
        raise _unreadable(path, "cannot be read", error, "; remove the file to compute them anew") from None


def read_given(path: Path) -> Given:
    """Read support_x [n, d], support_y [n], query_x [m, d], query_y [m] from an .npz.

    x is float32 or float64, y integers 0 … classes-1, all of them in support_y.
    Raises InputError naming the file and the array, what was found and what would be right.
    """
    if not files.is_file(path):
        what = "not a file" if files.exists(path) else "no such file"
        raise InputError(f"features {path}: {what}; an .npz with {', '.join(_GIVEN)} would be right")
    with path.open("rb") as data:
        sha256 = hashlib.sha256()
        while piece := data.read(1 << 20):
            sha256.update(piece)
    try:
        file = np.load(path, allow_pickle=False)
    except _UNREADABLE as error:
        with path.open("rb") as data:
            kind = file_kind(data.read(LOOKED_AT))
        if kind.startswith("a zip"):
            raise _unreadable(path, "no .npz file", error) from None
        raise InputError(
            f"features {path}: {kind or 'of no known kind'}; an .npz with {', '.join(_GIVEN)} would be right"
        ) from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise InputError(f"features {path}: a single array; an .npz with {', '.join(_GIVEN)} would be right")
    with file:
        missing = [name for name in _GIVEN if name not in file.files]
        if missing:
            raise InputError(f"features {path}: no {', '.join(missing)}; found {', '.join(file.files) or 'no arrays'}")
        try:
            support, support_labels, query, query_labels = (file[name] for name in _GIVEN)
        except _UNREADABLE as error:
            raise _unreadable(path, "an array cannot be read", error) from None
    for split, x, y in (("support", support, support_labels), ("query", query, query_labels)):
        _check_pair(f"features {path}", split, x, y)
    if support.shape[1] != query.shape[1]:
        raise InputError(
            f"features {path}: support_x has {support.shape[1]} features, query_x {query.shape[1]}; "
            "as many in both would be right"
        )
    classes = _check_labels(f"features {path}", support_labels, query_labels)
    features = FeatureSet(np.arange(len(support)), _native(support), _native(query))
    labels = (support_labels.astype(np.int64), query_labels.astype(np.int64))
    return Given(path, sha256.hexdigest(), features, *labels, classes)


def _unreadable(path: Path, what: str, error: Exception, mend: str = "") -> InputError:
    if isinstance(error, OSError) and error.errno:  # numpy raises OSErrors of its own, without a number
        return files.failure(path, error)
    return InputError(f"features {path}: {what}: {error}{mend}")


def _check_pair(where: str, split: str, x: NDArray[Any], y: NDArray[Any]) -> None:
    if x.ndim != 2 or x.dtype.kind != "f" or x.dtype.itemsize not in (4, 8) or 0 in x.shape:
        raise InputError(
            f"{where}: {split}_x is {x.dtype} {list(x.shape)}; it must be float32 or float64 [n, features]"
        )
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise InputError(f"{where}: {split}_y is {y.dtype} {list(y.shape)}; it must be integers [n]")
    if len(x) != len(y):
        raise InputError(
            f"{where}: {split}_x has {len(x)} rows, {split}_y {len(y)}; a label for each row would be right"
        )
    if lost := _not_finite(x):
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise InputError(f"{where}: {split}_x is not finite in {lost} of {len(x)} rows, first in row {row}")


def _check_labels(where: str, support: NDArray[Any], query: NDArray[Any]) -> int:
    present = np.unique(support)
    if present[0] < 0 or present[-1] != len(present) - 1:
        expected = np.arange(len(present))
        gap = int(expected[present != expected][0]) if present[0] >= 0 else int(present[0])
        what = f"no label {gap}" if present[0] >= 0 else f"a label {gap}"
        raise InputError(f"{where}: support_y has {what}; labels 0 … C-1 that all occur would be right")
    if len(present) < 2:
        raise InputError(f"{where}: support_y has one class; two or more would be right")
    strange = (query < 0) | (query > present[-1])
    if strange.any():
        raise InputError(
            f"{where}: query_y has {int(strange.sum())} labels outside 0 … {present[-1]}, the first in row "
            f"{int(np.flatnonzero(strange)[0])}; labels that occur in support_y would be right"
        )
    return len(present)


def _not_finite(x: NDArray[Any]) -> int:
    """How many rows hold a NaN or an infinity."""
    return int((~np.isfinite(x).all(axis=1)).sum())


def _native(x: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))


def _version(shard: Shard, timeouts: Timeouts | None) -> str:
    if etag_of(shard.digest) or not is_remote(shard.url):
        return shard.digest
    found = stat(shard.url, timeouts)
    return f"{found.size} {found.etag or found.modified}"


def _write_time(shard: Shard) -> int:
    if is_remote(shard.url):
        return 0
    try:
        return os.stat(shard.url).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return 0
