"""A user's file of features, checked: the same protocol for features from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewshot.cache import UNREADABLE, FeatureSet, count_not_finite, unreadable
from pretrain import files
from pretrain.errors import InputError
from pretrain.storage.filekind import LOOKED_AT, file_kind

_GIVEN = ("support_x", "support_y", "query_x", "query_y")


@dataclass(frozen=True)
class GivenFeatures:
    """The features of a user's file. `support_ids` are row numbers; labels are int64 0 … classes-1."""

    path: Path
    sha256: str
    features: FeatureSet
    support_labels: NDArray[np.int64]
    query_labels: NDArray[np.int64]
    classes: int


def read_given(path: Path) -> GivenFeatures:
    """Read support_x [n, d], support_y [n], query_x [m, d], query_y [m] from an .npz.

    x is float32 or float64, y integers 0 … classes-1, all of them in support_y.
    Raises InputError naming the file and the array, what was found and what would be right.
    """
    if not files.is_file(path):
        what = "not a file" if files.exists(path) else "no such file"
        raise InputError(f"features {path}: {what}; an .npz with {', '.join(_GIVEN)} would be right")
    sha256 = files.sha256(path)
    try:
        file = np.load(path, allow_pickle=False)
    except UNREADABLE as error:
        with path.open("rb") as data:
            kind = file_kind(data.read(LOOKED_AT))
        if kind.startswith("a zip"):
            raise unreadable(path, "no .npz file", error) from None
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
        except UNREADABLE as error:
            raise unreadable(path, "an array cannot be read", error) from None
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
    return GivenFeatures(path, sha256, features, *labels, classes)


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
    if lost := count_not_finite(x):
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise InputError(f"{where}: {split}_x is not finite in {lost} of {len(x)} rows, first in row {row}")


def _check_labels(where: str, support: NDArray[Any], query: NDArray[Any]) -> int:
    present = np.unique(support)
    missing = np.setdiff1d(np.arange(present[-1] + 1), present)
    if present[0] < 0 or len(missing):
        what = f"a label {present[0]}" if present[0] < 0 else f"no label {missing[0]}"
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


def _native(x: NDArray[Any]) -> NDArray[Any]:
    """The same values in the machine's byte order."""
    return np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
