"""A quantity over a run's steps, and what of it fits into a chart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import InputError

Floats = NDArray[np.float64]

COLUMNS = 1200  # of a chart: about its pixels
_SMOOTHED = 50  # a curve is averaged over this part of its points
_APART = 2.5  # times the usual distance between two points from which they are not joined


@dataclass(frozen=True)
class Columns:
    """Of the points that fall into each of equal parts of the axis; NaN where there is none.

    x: the middle of the part. least, most, mean: of y. All float64 [columns].
    """

    x: Floats
    least: Floats
    most: Floats
    mean: Floats


@dataclass(frozen=True)
class Series:
    """Points of a curve, float64 [n] each: x ascends, and y is NaN where a run wrote down no number."""

    x: Floats
    y: Floats

    @classmethod
    def of(cls, lines: Iterable[dict[str, Any]], name: str, scale: float = 1) -> Series:
        """The values of `name` over `scale` times the step, in the lines that have it.

        Raises:
            InputError: one is no number.
        """
        found = [line for line in lines if name in line]
        try:
            x, y = (np.array([line[key] for line in found], np.float64) for key in ("step", name))  # null becomes NaN
        except (TypeError, ValueError):
            odd = next(line[name] for line in found if not isinstance(line[name], int | float | None))
            raise InputError(f"metrics.jsonl: {name} is {odd!r} in a line; a number would be right") from None
        return cls(x * scale, np.where(np.isfinite(y), y, np.nan))

    @property
    def known(self) -> Series:
        """The points that have a number."""
        there = np.isfinite(self.y)
        return Series(self.x[there], self.y[there])

    @property
    def span(self) -> int:
        """Points over which `smoothed` averages."""
        return max(1, len(self.y) // _SMOOTHED)

    def smoothed(self) -> Series:
        """The exponential average over the last `span` points, without a bias towards the first (as TensorBoard's)."""
        if self.span == 1:
            return self
        weight, total, mass = 1 - 1 / self.span, 0.0, 0.0
        found = np.full(len(self.y), np.nan)
        for at, value in enumerate(self.y.tolist()):
            if value == value:
                total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
                found[at] = total / mass
        return Series(self.x, found)

    def columns(self, low: float, high: float, count: int = COLUMNS) -> Columns:
        """What falls into each of `count` equal parts of `low` … `high`: no peak is lost, however many points."""
        edges = np.linspace(low, high, count + 1)
        known = self.known
        at = np.clip(np.searchsorted(edges, known.x, side="right") - 1, 0, count - 1)
        least, most = np.full(count, np.nan), np.full(count, np.nan)
        np.fmin.at(least, at, known.y)
        np.fmax.at(most, at, known.y)
        points = np.bincount(at, minlength=count)
        sums = np.bincount(at, known.y, minlength=count)
        mean = np.divide(sums, points, out=np.full(count, np.nan), where=points > 0)
        return Columns((edges[:-1] + edges[1:]) / 2, least, most, mean)

    def parted(self) -> Series:
        """The points with a gap wherever two do not follow each other, as in lines that several starts have left."""
        if len(self.x) < 2:
            return self
        steps = np.diff(self.x)
        usual = np.median(steps[steps > 0]) if (steps > 0).any() else 1.0
        gaps = np.flatnonzero((steps <= 0) | (steps > _APART * usual)) + 1
        return Series(np.insert(self.x, gaps, np.nan), np.insert(self.y, gaps, np.nan))
