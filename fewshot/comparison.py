"""Paired comparisons: how far one network, feature or probe is ahead of another on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fewshot.score import Result, Scores

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95

METHOD = (
    "accuracy of a minus that of b, on the same support sets and query images. Interval: paired bootstrap over the "
    "query images: of each, the difference of being right, averaged over the draws; "
    f"{RESAMPLES:,} resamples (numpy default_rng({SEED})); 2.5 % and 97.5 % percentiles of the mean. It covers the "
    "choice of query images. It does not cover the choice of support sets (compare the draws) nor the training run "
    "(the same recipe with another seed). Each interval stands alone: of 20 comparisons of equals, about one excludes 0"
)


@dataclass(frozen=True)
class Side:
    """What is compared: a probe on a feature of a network."""

    weights: str
    features: str
    probe: str


@dataclass(frozen=True)
class Comparison:
    """The accuracy of `a` less that of `b`, in [-1, 1], at so many shots.

    Args:
        difference: mean over the draws.
        low, high: its interval.
        draws: the difference in each draw, in the order of the seeds.
        converged: as `Mean`'s, of both sides.
    """

    a: Side
    b: Side
    shots: int
    difference: float
    low: float
    high: float
    draws: tuple[float, ...]
    converged: bool


def compare(scores: Scores, labels: NDArray[np.int64], features: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Compare the first probe on the first feature with the same probe on the others, then with the other probes.

    Args:
        labels: of the query images, int64 [m].
        features: (weights, features) of rows whose predictions are kept.

    Returns:
        A row for each pair and number of shots.
    """
    sides: dict[Side, dict[int, list[Result]]] = {}
    for row in scores.predicted:
        side = Side(row.weights, row.features, row.probe)
        sides.setdefault(side, {}).setdefault(row.shots, []).append(row)
    if not (sides and features):
        return []
    first = next(iter(sides)).probe
    a, *others = (Side(*feature, first) for feature in dict.fromkeys(features))
    probes = [side for side in sides if side == Side(a.weights, a.features, side.probe) and side != a]
    return [
        _comparison(scores, labels, a, b, sides[a][shots], sides[b][shots])
        for b in (*others, *probes)
        for shots in sides[a]
    ]


def _comparison(
    scores: Scores, labels: NDArray[np.int64], a: Side, b: Side, rows_a: list[Result], rows_b: list[Result]
) -> Comparison:
    """Of the rows of both sides at one number of shots, a row for each seed."""
    pairs = list(zip(rows_a, rows_b, strict=True))
    margins = np.sum([_right(scores, labels, one) - _right(scores, labels, other) for one, other in pairs], axis=0)
    low, high = mean_interval(margins)
    draws = tuple(one.accuracy - other.accuracy for one, other in pairs)
    converged = all(row.converged for row in (*rows_a, *rows_b))
    return Comparison(a, b, rows_a[0].shots, fmean(draws), low / len(draws), high / len(draws), draws, converged)


def _right(scores: Scores, labels: NDArray[np.int64], row: Result) -> NDArray[np.int64]:
    """1 where the row's prediction is the label, else 0 [m]."""
    return (scores.predicted[row] == labels).astype(np.int64)


def mean_interval(values: NDArray[np.int64]) -> tuple[float, float]:
    """The bootstrap's percentile interval of the mean of whole numbers [m], of level LEVEL.

    Few of the values are distinct, and a resample is a multinomial draw of how often each of them occurs: that is
    sampling m of them with replacement, at the cost of the distinct ones. The interval of -values is the
    negative one, unless their mean is 0: then up to the noise of the resamples.
    """
    sign = -1 if values.sum() < 0 else 1
    distinct, counts = np.unique(sign * values, return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(len(values), counts / len(values), size=RESAMPLES)
    means = sign * np.sort(drawn @ distinct) / len(values)
    outside = round(RESAMPLES * (1 - LEVEL) / 2)
    low, high = sorted((float(means[outside - 1]), float(means[-outside])))
    return low, high
