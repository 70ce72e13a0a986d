"""Accuracies: every probe on every support set, scored on all query images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewshot import probes
from fewshot.draw import Draw
from fewshot.probes import Fitted, Predictor
from fewshot.ridge import SWEEP, Ridge
from fewshot.store import FeatureSet

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
    """What was measured. `seconds`: wall time by part."""

    results: list[Result]
    sweeps: list[Sweep]
    seconds: dict[str, float]


def score(
    features: FeatureSet,
    draws: Sequence[Draw],
    query_labels: NDArray[np.int64],
    *,
    classes: int,
    probe_names: Sequence[str],
    l2: float,
    device: torch.device,
    oracle: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> tuple[list[Result], list[Sweep]]:
    """Fit each probe on each draw and score it on all of `features.query` [m, d], in fp64 on `device`.

    oracle: the sweep over λ as well. advance: called after each support set. The rows' `weights` and
    `features` are left empty for the caller, who knows them.
    """
    fits: dict[str, Callable[..., Fitted]] = {"ridge": partial(probes.ridge, l2=l2), **probes.OTHERS}
    strengths: dict[str, float | None] = {"ridge": l2, "logistic": probes.LOGISTIC_L2}
    results, sweeps = [], []
    largest = max(len(draw.ids) for draw in draws) * features.query.shape[1] * classes
    with _threads_for(largest):
        for draw in draws:
            support = torch.from_numpy(features.rows(draw.ids)).to(device).double()
            labels = torch.from_numpy(draw.labels).to(device)
            for name in probe_names:
                fitted = fits[name](support, labels, classes)
                right = accuracy(fitted, features.query, query_labels, device)
                results.append(
                    Result("", name, "", draw.shots, draw.seed, strengths.get(name), right, fitted.converged)
                )
            if oracle:
                solved = Ridge.fit(support, labels, classes)
                curve = tuple(accuracy(solved.predictor(at), features.query, query_labels, device) for at in SWEEP)
                sweeps.append(Sweep("", "", draw.shots, draw.seed, SWEEP, curve))
            advance()
    return results, sweeps


@contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """One thread inside the block where products are small.

    More would wait for one another: twenty times as long, where other processes want the cores too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < _SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def accuracy(
    predict: Predictor, query: NDArray[np.floating[Any]], labels: NDArray[np.int64], device: torch.device
) -> float:
    """The share of rows of `query` [m, d] that `predict` gives their label [m]."""
    right = 0
    for begin in range(0, len(query), _CHUNK):
        x = torch.from_numpy(query[begin : begin + _CHUNK]).to(device).double()
        y = torch.from_numpy(labels[begin : begin + _CHUNK]).to(device)
        right += int((predict(x) == y).sum())
    return right / len(query)


def summarise(results: Sequence[Result]) -> list[Mean]:
    """The rows' means over seeds, in the order in which weights, probe, features and shots first occur."""

    def key(row: Result) -> tuple[str, str, str, int]:
        return row.weights, row.probe, row.features, row.shots

    place = {found: number for number, found in enumerate(dict.fromkeys(map(key, results)))}
    ordered = sorted(results, key=lambda row: place[key(row)])
    groups = [(found, list(rows)) for found, rows in groupby(ordered, key)]
    return [
        Mean(*found, *mean_std([row.accuracy for row in rows]), all(row.converged for row in rows))
        for found, rows in groups
    ]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1), None of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def fp64_device(device: torch.device) -> torch.device:
    """`device` where it computes in fp64, else the CPU."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # an accelerator without it
        return torch.device("cpu")
    return device
