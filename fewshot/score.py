"""Accuracies: every probe on every support set, scored on all query images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewshot.cache import FeatureSet, NetworkFeatures, find_baselines, read_feature
from fewshot.config import ProtocolSection
from fewshot.features import headline
from fewshot.given import GivenFeatures
from fewshot.probes.fitted import Fitted, Linear
from fewshot.probes.support import Support
from fewshot.probes.table import PROBES, SWEPT
from fewshot.task import Draw, Task, draw_support
from pretrain.model.arithmetic import threads
from pretrain.progress import Progress

_CHUNK = 1024  # query images held in fp64 at once
_SMALL = 10**9  # multiply-adds of a product that is not worth more than one thread


@dataclass(frozen=True)
class Result:
    """One accuracy, in [0, 1]. `l2` is None for a probe that has none; `converged`: as `Fitted`'s."""

    weights: str
    probe: str
    features: str
    shots: int
    seed: int
    l2: float | None
    accuracy: float
    converged: bool = True


@dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation (ddof 1; None of a single seed) over the seeds; whether all converged."""

    weights: str
    probe: str
    features: str
    shots: int
    mean: float
    std: float | None
    converged: bool = True


@dataclass(frozen=True)
class Sweep:
    """The ridge for every λ of `l2`, scored on the query set: a curve, not a result to choose from."""

    weights: str
    features: str
    shots: int
    seed: int
    l2: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """What was measured. `seconds`: wall time by part.

    `predicted`: the class of every query image [m], in the smallest type that holds all classes, for the rows of
    results whose query images are compared one by one: the first probe's of every feature, and every probe's of a
    leading feature. (All rows: 100 KB each for ImageNet, thousands of them where every block is probed.)
    `fitted`: what `save_probes` names, of a leading feature; 10 MB each for ImageNet.
    """

    results: list[Result] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    predicted: dict[Result, NDArray[np.unsignedinteger[Any]]] = field(default_factory=dict)
    fitted: dict[Result, Linear] = field(default_factory=dict)

    def add(self, other: Scores, weights: str, features: str) -> None:
        """Add what `score` found, which is of a feature of `weights`."""
        named = {row: replace(row, weights=weights, features=features) for row in other.results}
        self.results.extend(named.values())
        self.sweeps.extend(replace(row, weights=weights, features=features) for row in other.sweeps)
        self.predicted.update({named[row]: classes for row, classes in other.predicted.items()})
        self.fitted.update({named[row]: linear for row, linear in other.fitted.items()})


def score_networks(
    networks: Sequence[NetworkFeatures], task: Task, protocol: ProtocolSection, device: torch.device
) -> Scores:
    """Fit and score every probe on every feature of every network, on `device`; a shared baseline once. For one rank.

    The λ sweep is made of each network's leading feature only.
    Raises InputError where features are not finite.
    """
    began = time.monotonic()
    scores = Scores()
    parts = [
        (one, name)
        for one, baselines in zip(networks, find_baselines(networks), strict=True)
        for name in one.files
        if baselines.get(name, one.network.id) == one.network.id
    ]
    with Progress("probes", "support sets", len(parts) * len(task.draws)) as progress:
        for one, name in parts:
            leading = name == headline(list(one.files))
            features = read_feature(one.files[name], name, f"weights {one.network.source.path}")
            found = score(
                features, task.draws, task.query_labels, task.classes, protocol, device, leading, progress.advance
            )
            scores.add(found, one.network.id, name)
    scores.seconds["probes"] = time.monotonic() - began
    return scores


def score_given(given: GivenFeatures, protocol: ProtocolSection, id: str) -> tuple[Scores, tuple[Draw, ...]]:
    """Score a user's features, as those of weights `id`. Raises InputError where a class has too few rows."""
    began = time.monotonic()
    where = f"features {given.path}: support_y"
    classes, shots, seeds = given.classes, protocol.shots, protocol.seeds
    draws = draw_support(given.support_labels, classes=classes, shots=shots, seeds=seeds, where=where)
    scores, cpu = Scores(), torch.device("cpu")
    with Progress("probes", "support sets", len(draws)) as progress:
        found = score(given.features, draws, given.query_labels, classes, protocol, cpu, True, progress.advance)
    scores.add(found, id, "given")
    scores.seconds["probes"] = time.monotonic() - began
    return scores, draws


def score(
    features: FeatureSet,
    draws: Sequence[Draw],
    query_labels: NDArray[np.int64],
    classes: int,
    protocol: ProtocolSection,
    device: torch.device,
    leading: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Scores:
    """Fit each probe of `protocol` on each draw and score it on all of `features.query` [m, d], in fp64 on `device`.

    Args:
        leading: whether the feature leads its network's report: λ is swept as well, where `protocol` says so, and every
            probe's predictions are kept.
        advance: called after each support set.

    Returns:
        Rows whose `weights` and `features` are empty: `Scores.add` sets them.
    """
    scores, smallest = Scores(), np.min_scalar_type(classes - 1)
    largest = max(len(draw.ids) for draw in draws) * features.query.shape[1] * classes
    with threads(worth_threads(largest)):
        for draw in draws:
            rows = torch.from_numpy(features.rows(draw.ids)).to(device).double()
            labels = torch.from_numpy(draw.labels).to(device)
            support = Support(rows, labels, classes)
            for probe in [PROBES[name] for name in protocol.probes]:
                told = protocol.l2 if probe.configured else probe.l2
                fitted = probe.fit(support, told or 0.0)
                l2 = told if fitted.l2 is None else fitted.l2
                classified = predict(fitted, features.query, device)
                right = share_right(classified, query_labels)
                row = Result("", probe.name, "", draw.shots, draw.seed, l2, right, fitted.converged)
                scores.results.append(row)
                if leading or probe.name == protocol.probes[0]:
                    scores.predicted[row] = classified.astype(smallest)
                if leading and probe.name in protocol.save_probes and fitted.linear:
                    scores.fitted[row] = fitted.linear.to(torch.device("cpu"))
            if leading and protocol.oracle:
                swept = SWEPT.fit(support, protocol.l2)
                assert swept.with_l2 is not None
                curve = [
                    share_right(predict(swept.with_l2(l2), features.query, device), query_labels) for l2 in SWEPT.sweep
                ]
                scores.sweeps.append(Sweep("", "", draw.shots, draw.seed, SWEPT.sweep, tuple(curve)))
            advance()
    return scores


def worth_threads(multiplications: int) -> int:
    """How many threads a probe is worth whose products are so large.

    More than one for small products would wait for one another: twenty times as long, where other processes want the
    cores too. And the last digits would hang on their number.
    """
    return 1 if multiplications < _SMALL else torch.get_num_threads()


def predict(fitted: Fitted, query: NDArray[np.floating[Any]], device: torch.device) -> NDArray[np.int64]:
    """The class that `fitted` gives each row of `query` [m, d], int64 [m]."""
    return np.concatenate([fitted(chunk).cpu().numpy() for chunk in chunks(query, device)])


def chunks(query: NDArray[np.floating[Any]], device: torch.device) -> Iterator[Tensor]:
    """`query` [m, d] in parts, fp64 on `device`."""
    for begin in range(0, len(query), _CHUNK):
        yield torch.from_numpy(query[begin : begin + _CHUNK]).to(device).double()


def share_right(classified: NDArray[np.integer[Any]], labels: NDArray[np.int64]) -> float:
    """The share of query images whose class is their label, both [m]."""
    return int((classified == labels).sum()) / len(labels)


def summarise(results: Sequence[Result]) -> list[Mean]:
    """The rows' means over seeds, in the order in which weights, probe, features and shots first occur."""
    groups: dict[tuple[str, str, str, int], list[Result]] = {}
    for row in results:
        groups.setdefault((row.weights, row.probe, row.features, row.shots), []).append(row)
    means = []
    for group, rows in groups.items():
        values = [row.accuracy for row in rows]
        deviation = stdev(values) if len(values) > 1 else None
        means.append(Mean(*group, fmean(values), deviation, all(row.converged for row in rows)))
    return means


def fp64_device(device: torch.device) -> torch.device:
    """`device` where it computes in fp64, else the CPU."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # an accelerator without it
        return torch.device("cpu")
    return device
