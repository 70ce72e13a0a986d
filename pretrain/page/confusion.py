"""Which classes are taken for which: counts, their picture, and tables of classes and of mistakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import FigureBase
from numpy.typing import NDArray

from pretrain.console import isolated
from pretrain.page.figure import FILL, name_style
from pretrain.page.text import Table, shortened

Ids = NDArray[np.int64]
Name = Callable[[int], str]  # of a class

HEIGHT = 5.4  # inches of the picture
MISTAKES = 15  # pairs of classes that the picture and the table name
_NAMED = 50  # classes that are named in the matrix; more are blocks of consecutive ones
_COUNTED = 20  # classes whose counts stand in the cells
_LISTED = 60  # classes of a table; of more the ends
_ENDS = 20


@dataclass(frozen=True)
class Confusions:
    """How often a class is predicted for images whose one label is another, or the same: all pairs that occur.

    labels, predicted, counts: int64 [p], by label, then by prediction.
    """

    labels: Ids
    predicted: Ids
    counts: Ids

    @classmethod
    def of(cls, predicted: Ids, labels: Ids) -> Confusions:
        """Of the predicted classes of images, and their labels, int64 [n] each."""
        found, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
        return cls(found[:, 0], found[:, 1], counts)

    @property
    def classes(self) -> int:
        """The largest number of a class, plus 1."""
        return int(max(self.labels.max(initial=-1), self.predicted.max(initial=-1))) + 1

    def matrix(self, blocks: int | None = None) -> Ids:
        """Counts int64 [label, prediction] of all classes, or of `blocks` of consecutive ones, about equally many."""
        classes = self.classes
        size = min(blocks or classes, classes)
        matrix = np.zeros((size, size), np.int64)
        np.add.at(matrix, (self.labels * size // classes, self.predicted * size // classes), self.counts)
        return matrix

    def commonest(self, most: int) -> list[tuple[int, int, int]]:
        """The mistakes (label, prediction, count) that occur most often, those of smaller classes first at a tie."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        taken = wrong[np.argsort(-self.counts[wrong], kind="stable")][:most]
        return [(int(self.labels[at]), int(self.predicted[at]), int(self.counts[at])) for at in taken]


def mistakes_table(mistakes: Sequence[tuple[int, int, int]], name: Name, caption: str = "") -> Table:
    """Mistakes (label, prediction, count), as `Confusions.commonest` gives them; the first MISTAKES."""
    rows = [[name(label), name(predicted), f"{count:,}"] for label, predicted, count in mistakes[:MISTAKES]]
    return Table(["label", "predicted", "images"], rows, caption, names=2)


def class_tables(
    labels: Sequence[int],
    accuracy: Callable[[int], float],
    header: Sequence[str],
    cells: Callable[[int], Sequence[str]],
    what: str = "",
) -> list[Table]:
    """A row of `cells` for each class of `labels`; of many, the classes at both ends by `accuracy`."""
    if len(labels) <= _LISTED:
        return [Table(header, [cells(label) for label in labels], what)]
    ordered = sorted(labels, key=accuracy)
    return [
        Table(header, [cells(label) for label in part], f"The {_ENDS} classes of {word} accuracy{what and f', {what}'}")
        for word, part in (("lowest", ordered[:_ENDS]), ("highest", ordered[: -_ENDS - 1 : -1]))
    ]


def draw_confusions(figure: FigureBase, confusions: Confusions, name: Name, title: str) -> None:
    """The matrix and, beside it, the most frequent mistakes."""
    matrix, mistakes = figure.subplots(1, 2, gridspec_kw={"width_ratios": (6, 5)})
    _draw_matrix(matrix, confusions, name, title)
    _draw_mistakes(mistakes, confusions, name)


def _draw_matrix(axes: Axes, confusions: Confusions, name: Name, title: str) -> None:
    """Share of each label's images by prediction; of many classes, in blocks of consecutive ones."""
    classes = confusions.classes
    counts = confusions.matrix(_NAMED)
    size = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    axes.set_title(shortened(title, 60), fontsize=10, loc="left", **name_style())
    if size < classes:
        starts = [-(-block * classes // size) for block in range(0, size, 5)]
        axes.set_xticks(range(0, size, 5), map(str, starts), fontsize=7, rotation=90)
        axes.set_yticks(range(0, size, 5), map(str, starts), fontsize=7)
        axes.set_xlabel(f"predicted; {classes:,} classes in {size} blocks of consecutive numbers")
    else:
        names = [shortened(name(label), 18) for label in range(size)]
        small = 8 if size <= _COUNTED else 5
        axes.set_xticks(range(size), names, fontsize=small, rotation=90, **name_style())
        axes.set_yticks(range(size), names, fontsize=small, **name_style())
        axes.set_xlabel("predicted")
    axes.set_ylabel("label; colour: share of a row, square-root scale")
    axes.tick_params(length=0)
    if size <= _COUNTED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            ink = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=6, color=ink)


def _draw_mistakes(axes: Axes, confusions: Confusions, name: Name) -> None:
    """The most frequent mistakes as bars."""
    mistakes = confusions.commonest(MISTAKES)
    if not mistakes:
        axes.set_axis_off()
        return
    counts = [count for _, _, count in mistakes]
    bars = axes.barh(range(len(mistakes)), counts, height=0.65, color=FILL)
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize=7)
    names = [" → ".join(isolated(shortened(name(one), 18)) for one in pair) for *pair, _ in mistakes]
    axes.set_yticks(range(len(mistakes)), names, fontsize=8, **name_style())
    axes.set_ylim(MISTAKES - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(counts))
    axes.set_title("most frequent mistakes: label → prediction, images", fontsize=10, loc="left")
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
