"""One probe looked at closely: what it makes of every query image, and which support images are near to some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewshot.cache import FeatureSet, NetworkFeatures, read_feature
from fewshot.config import ProtocolSection
from fewshot.features import headline
from fewshot.given import GivenFeatures
from fewshot.probes.support import Support
from fewshot.probes.table import PROBES
from fewshot.score import Result, Scores, worth_threads
from fewshot.task import Draw, Task
from pretrain.index.index import Index
from pretrain.model.arithmetic import threads
from pretrain.page.confusion import Confusions

Ids = NDArray[np.int64]

QUERIES = 8  # whose neighbours are told
NEIGHBOURS = 5  # of each
WORST = 16  # mistakes that are told
_CHUNK = 1024  # query images whose scores are held at once
_DIGITS = 9  # of cosines and margins: a smaller difference is a tie, for any number of threads


@dataclass(frozen=True)
class Near:
    """A query image, by its row, and support images, by their place in the draw, with their cosines to it."""

    row: int
    places: tuple[int, ...]
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class Mistake:
    """A query image whose predicted class has a score above that of its label by `margin`; beside it the support image
    of the predicted class that is nearest to it.
    """

    margin: float
    near: Near


@dataclass(frozen=True)
class Closeup:
    """One row of the report's results, image by image.

    Args:
        query_ids, labels, predicted: of the query images, int64 [m].
        neighbours: the nearest support images of the draw, by cosine, of some query images.
        mistakes: those of the largest margins, the largest first.
        indices: of the support and the query images; None for features from a file.
    """

    row: Result
    draw: Draw
    query_ids: Ids
    labels: Ids
    predicted: Ids
    neighbours: Sequence[Near]
    mistakes: Sequence[Mistake]
    indices: tuple[Index, Index] | None = None

    @property
    def confusions(self) -> Confusions:
        return Confusions.of(self.predicted, self.labels)

    def name(self, label: int) -> str:
        """What a class is called; its number where it has no name."""
        found = next((index.classes for index in self.indices or () if index.classes), ())
        return found[label] if label < len(found) else str(label)


def look_at_networks(
    networks: Sequence[NetworkFeatures], task: Task, protocol: ProtocolSection, scores: Scores, device: torch.device
) -> Closeup:
    """The leading feature of the network that others are compared with, of the headline's draw; the first feature of
    the first network, where all have baselines alone.
    """
    one = reference(networks)
    name = headline(list(one.files)) or next(iter(one.files))
    features = read_feature(one.files[name], name, f"weights {one.network.path}")
    row, draw = _headline_row(scores, task.draws, one.network.id, name, protocol.probes[0])
    queries = task.query_ids, task.query_labels
    return _look(row, draw, features, queries, scores, device, (task.support, task.query))


def reference(networks: Sequence[NetworkFeatures]) -> NetworkFeatures:
    """The newest weights of the first run."""
    led = [one for one in networks if headline(list(one.files))]
    if not led:
        return networks[0]
    same_run = [one for one in led if one.network.run == led[0].network.run]
    return max(same_run, key=lambda one: one.network.source.step or 0)


def look_at_given(given: GivenFeatures, draws: Sequence[Draw], protocol: ProtocolSection, scores: Scores) -> Closeup:
    """A user's features, of the headline's draw."""
    first = scores.results[0]
    row, draw = _headline_row(scores, draws, first.weights, first.features, protocol.probes[0])
    queries = np.arange(len(given.query_labels)), given.query_labels
    return _look(row, draw, given.features, queries, scores, torch.device("cpu"))


def _headline_row(
    scores: Scores, draws: Sequence[Draw], weights: str, features: str, probe: str
) -> tuple[Result, Draw]:
    """The row of 5 shots, or of the most there are, and of the first seed; its draw."""
    shots = {draw.shots for draw in draws}
    draw = next(draw for draw in draws if draw.shots == (5 if 5 in shots else max(shots)))
    wanted = weights, features, probe, draw.shots, draw.seed
    return next(row for row in scores.predicted if _place(row) == wanted), draw


def _place(row: Result) -> tuple[str, str, str, int, int]:
    return row.weights, row.features, row.probe, row.shots, row.seed


def _look(
    row: Result,
    draw: Draw,
    features: FeatureSet,
    queries: tuple[Ids, Ids],
    scores: Scores,
    device: torch.device,
    indices: tuple[Index, Index] | None = None,
) -> Closeup:
    """`queries`: ids and labels of the query images."""
    query_ids, labels = queries
    predicted = scores.predicted[row].astype(np.int64)
    support = features.rows(draw.ids)
    wrong = np.flatnonzero(predicted != labels)
    margins = _margins(row, draw, support, features.query[wrong], predicted[wrong], labels[wrong], device)
    worst = np.argsort(-margins, kind="stable")[:WORST]
    mistakes = [
        Mistake(
            float(margins[at]),
            _nearest(int(wrong[at]), features.query, support, np.flatnonzero(draw.labels == predicted[wrong[at]]), 1),
        )
        for at in worst
    ]
    everywhere = np.arange(len(draw.ids))
    neighbours = [
        _nearest(number, features.query, support, everywhere, NEIGHBOURS) for number in _some_of_each(labels, QUERIES)
    ]
    return Closeup(row, draw, query_ids, labels, predicted, neighbours, mistakes, indices)


def _margins(
    row: Result,
    draw: Draw,
    support: NDArray[Any],
    query: NDArray[Any],
    predicted: Ids,
    labels: Ids,
    device: torch.device,
) -> NDArray[np.float64]:
    """The score of the predicted class less that of the label, fp64 [n], for query features [n, d]."""
    probe, classes = PROBES[row.probe], len(draw.ids) // draw.shots
    found = [np.zeros(0)]
    with threads(worth_threads(len(draw.ids) * support.shape[1] * classes)):
        rows = torch.from_numpy(support).to(device).double()
        fitted = probe.fit(Support(rows, torch.from_numpy(draw.labels).to(device), classes), row.l2 or 0.0)
        for begin in range(0, len(query), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            scores = fitted.scores(torch.from_numpy(query[part]).to(device).double()).cpu().numpy()
            at = np.arange(len(scores))
            found.append(scores[at, predicted[part]] - scores[at, labels[part]])
    return np.concatenate(found).round(_DIGITS)


def _nearest(row: int, query: NDArray[Any], support: NDArray[Any], places: Ids, most: int) -> Near:
    """Of the support images at `places`, the `most` of the largest cosine to a query image."""
    others, one = support[places].astype(np.float64), query[row].astype(np.float64)
    lengths = np.linalg.norm(others, axis=1) * np.linalg.norm(one)
    cosines = (others @ one / np.maximum(lengths, np.finfo(np.float64).tiny)).round(_DIGITS)
    nearest = np.argsort(-cosines, kind="stable")[:most]
    return Near(row, tuple(places[nearest].tolist()), tuple(cosines[nearest].tolist()))


def _some_of_each(labels: Ids, most: int) -> list[int]:
    """Rows of query images: one of each class, the middle one of its rows; of many classes, some spread evenly."""
    classes = np.unique(labels)
    shown = classes[np.linspace(0, len(classes) - 1, min(most, len(classes))).round().astype(int)]
    rows = [np.flatnonzero(labels == label) for label in shown]
    return [int(members[len(members) // 2]) for members in rows]
