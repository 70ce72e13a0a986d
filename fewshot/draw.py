"""Which images are learned from: support sets, a function of seed, labels and ids alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import InputError

_NAMED = 5  # classes named in a message


@dataclass(frozen=True)
class Draw:
    """One support set: `ids` int64 [classes · shots], class by class from 0, each in the order drawn."""

    shots: int
    seed: int
    ids: NDArray[np.int64]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Their classes, int64 [classes · shots]."""
        return np.arange(len(self.ids), dtype=np.int64) // self.shots

    @property
    def sha256(self) -> str:
        """sha256 (hex) of `ids` as little-endian int64, in their order."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


def draw_support(
    labels: NDArray[np.int64],
    *,
    classes: int,
    shots: Sequence[int],
    seeds: Sequence[int],
    ids: NDArray[np.int64] | None = None,
    where: str = "support",
) -> tuple[Draw, ...]:
    """The support sets of every number of shots and every seed; shots of one seed are nested.

    One `np.random.default_rng(seed)` a seed; for class 0 … classes-1 in order, it permutes the class's ids in
    ascending order, and k shots take the first k (big_vision's few-shot evaluator).

    labels: int64 [n] in 0 … classes-1. ids: distinct int64 [n]; without them row numbers. What is drawn
    depends on the pairs (id, label), not on the order of the rows.
    Raises InputError where a class has fewer images than the most shots, naming `where` and the classes.
    """
    ids = np.arange(len(labels)) if ids is None else ids
    order = np.lexsort((ids, labels))
    counts = np.bincount(labels, minlength=classes)
    _check_counts(counts, max(shots), where)
    by_class = np.split(ids[order], np.cumsum(counts)[:-1])
    draws = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        permuted = [generator.permutation(members) for members in by_class]
        draws += [Draw(k, seed, np.concatenate([members[:k] for members in permuted])) for k in shots]
    return tuple(draws)


def _check_counts(counts: NDArray[np.int64], shots: int, where: str) -> None:
    short = np.flatnonzero(counts < shots)
    if not len(short):
        return
    few = ", ".join(f"class {label} has {counts[label]}" for label in short[:_NAMED])
    rest = f" and {len(short) - _NAMED} more classes have too few" if len(short) > _NAMED else ""
    most = int(counts.min())
    right = f"at most {most} shots" if most else "labels 0 … C-1 that all occur"
    raise InputError(
        f"{where}: {shots} shots need {shots} images of each of {len(counts)} classes; {few}{rest}; {right}, "
        "or more support images, would be right"
    )
