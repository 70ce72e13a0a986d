"""What is made of predictions: accuracy, calibration, a row for each class, and what is taken for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.page.confusion import Confusions

Ids = NDArray[np.int64]

TOP = 5  # classes of each image that are kept


@dataclass(frozen=True)
class Predictions:
    """What a network says of n images.

    Args:
        ids: canonical, int64 [n].
        keys: of the images in their shards.
        classes: the most probable ones, the first one most, int64 [n, k]; k is TOP, or all of fewer classes.
        probabilities: of these, fp32 [n, k].
        losses: fp32 [n]; NaN where it is not defined.
        readable: bool [n]. An image that does not decode was seen as grey, and what is said of it means nothing.
    """

    ids: NDArray[np.int64]
    keys: tuple[str | None, ...]
    classes: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    losses: NDArray[np.float32]
    readable: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """All images of `parts`, by ascending id."""
        ids = np.concatenate([part.ids for part in parts])
        order = np.argsort(ids, kind="stable")
        keys = [key for part in parts for key in part.keys]
        return cls(
            ids[order],
            tuple(keys[row] for row in order),
            np.concatenate([part.classes for part in parts])[order],
            np.concatenate([part.probabilities for part in parts])[order],
            np.concatenate([part.losses for part in parts])[order],
            np.concatenate([part.readable for part in parts])[order],
        )


@dataclass(frozen=True)
class Bin:
    """The images whose confidence is in (low, high]; in the first bin 0 too. The means are None without images."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class ClassScore:
    """One class.

    Args:
        images: that have it among their labels.
        top1, top5: of these, the share that is right; None without images.
        predicted: images for which it is the first prediction.
        precision: of these, the share that is right; None where it is never predicted.
    """

    label: int
    images: int
    top1: float | None
    top5: float | None
    predicted: int
    precision: float | None


@dataclass(frozen=True)
class Scores:
    """What predictions of a labelled set are worth.

    Args:
        images: that have a label, which the accuracies are of. An unreadable one counts as a miss.
        unlabelled: images in none of the figures.
        unreadable: labelled images that do not decode, which are in the accuracies alone.
        loss: the mean over readable images; None where it is not defined.
        confidence: the mean probability of the first prediction.
        ece: expected calibration error.
    """

    images: int
    unlabelled: int
    unreadable: int
    top1: float
    top5: float
    loss: float | None
    confidence: float | None
    ece: float | None
    bins: list[Bin]
    classes: list[ClassScore]
    confusions: Confusions


def score(predictions: Predictions, labels: Ids, bins: int) -> Scores:
    """Score predictions [n] against labels [n, L], padded with −1, in the same order.

    A prediction is right if it is one of the image's labels; a top-5 one, if one of the five is. Images without a label
    are left out, as in ReaL's evaluator.
    """
    has_label = (labels >= 0).any(axis=1)
    hits = (predictions.classes[:, :, None] == labels[:, None, :]).any(axis=2) & predictions.readable[:, None]
    right, among = hits[:, 0], hits.any(axis=1)
    seen = has_label & predictions.readable
    images = int(has_label.sum())
    losses = predictions.losses[seen].astype(np.float64)
    confidence = predictions.probabilities[seen, 0].astype(np.float64)
    table = calibration(confidence, right[seen], bins)
    any_seen = bool(len(losses))
    return Scores(
        images=images,
        unlabelled=len(labels) - images,
        unreadable=int((has_label & ~predictions.readable).sum()),
        top1=int(right.sum()) / images,
        top5=int(among.sum()) / images,
        loss=float(losses.mean()) if any_seen and np.isfinite(losses).all() else None,
        confidence=float(confidence.mean()) if any_seen else None,
        ece=calibration_error(table) if any_seen else None,
        bins=table,
        classes=by_class(predictions.classes[:, 0], labels, right, among, seen),
        confusions=confusions(predictions.classes[seen, 0], labels[seen]),
    )


def calibration(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int) -> list[Bin]:
    """Bins of equal width over [0, 1], closed above (Guo et al. 2017, arXiv:1706.04599), of images [n]."""
    edges = np.linspace(0, 1, bins + 1)
    at = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    found = []
    for number in range(bins):
        inside = at == number
        count = int(inside.sum())
        means = (float(confidence[inside].mean()), float(right[inside].mean())) if count else (None, None)
        found.append(Bin(float(edges[number]), float(edges[number + 1]), count, *means))
    return found


def calibration_error(bins: list[Bin]) -> float:
    """Σ share of the images · |accuracy − mean confidence| over the bins (Guo et al. 2017, eq. 3)."""
    gaps = [
        (one.images, abs(one.accuracy - one.confidence))
        for one in bins
        if one.accuracy is not None and one.confidence is not None
    ]
    return sum(images * gap for images, gap in gaps) / sum(images for images, _ in gaps)


def by_class(
    predicted: Ids, labels: Ids, right: NDArray[np.bool_], among: NDArray[np.bool_], seen: NDArray[np.bool_]
) -> list[ClassScore]:
    """A row for each class that an image has, or that is predicted for one: first predictions [n], labels [n, L]."""
    rows, columns = np.nonzero(labels >= 0)
    of = labels[rows, columns]
    size = int(max(of.max(initial=-1), predicted[seen].max(initial=-1))) + 1

    def count(classes: Ids, which: NDArray[np.bool_]) -> Ids:
        return np.bincount(classes[which], minlength=size)

    everything = np.ones(len(of), np.bool_)
    images, top1, top5 = count(of, everything), count(of, right[rows]), count(of, among[rows])
    chosen, precise = count(predicted, seen), count(predicted, seen & right)
    return [
        ClassScore(
            label,
            int(images[label]),
            _share(top1[label], images[label]),
            _share(top5[label], images[label]),
            int(chosen[label]),
            _share(precise[label], chosen[label]),
        )
        for label in np.flatnonzero(images + chosen).tolist()
    ]


def confusions(predicted: Ids, labels: Ids) -> Confusions:
    """The confusions of first predictions [n] of images with labels [n, L]; those with several labels are left out."""
    single = (labels >= 0).sum(axis=1) == 1
    return Confusions.of(predicted[single], labels[single].max(axis=1, initial=-1))


def _share(part: int, whole: int) -> float | None:
    return int(part) / int(whole) if whole else None
