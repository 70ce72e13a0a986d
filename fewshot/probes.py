"""The other probes on frozen features: logistic regression, neighbours, nearest class mean. All fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fewshot.ridge import Ridge
from fewshot.scaling import Scaling, class_sums

TEMPERATURE = 0.07  # of the neighbours' votes: Wu et al. 2018, Caron et al. 2021
LOGISTIC_L2 = 1.0
_ITERATIONS, _GRADIENT = 1000, 1e-6

Predictor = Callable[[Tensor], Tensor]  # features [m, d] → classes int64 [m]


@dataclass(frozen=True)
class Fitted:
    """Classifies: features [m, d] → classes int64 [m]. Not `converged` where its training ended before its optimum."""

    predict: Predictor
    converged: bool = True

    def __call__(self, features: Tensor) -> Tensor:
        return self.predict(features)


class Probe(Protocol):
    """Fits a support set, features [n, d] of classes int64 [n]."""

    def __call__(self, support: Tensor, labels: Tensor, classes: int) -> Fitted: ...


def ridge(support: Tensor, labels: Tensor, classes: int, *, l2: float) -> Fitted:
    """Least squares to ±1 targets, closed form: `fewshot.ridge`."""
    return Fitted(Ridge.fit(support, labels, classes).predictor(l2))


def logistic(support: Tensor, labels: Tensor, classes: int) -> Fitted:
    """One linear layer under softmax cross-entropy, trained to its optimum: full-batch L-BFGS from zero.

    Minimises Σᵢ CE(Wxᵢ + b, yᵢ) + λ/2·‖W‖² on standardised features, λ = LOGISTIC_L2, b free: what
    scikit-learn's LogisticRegression does as it comes (C = 1). λ is fixed beforehand, not chosen on queries.
    Converged is a mean gradient of at most 100 · _GRADIENT after at most _ITERATIONS.
    """
    scaling = Scaling.of(support)
    x = scaling(support)
    n, d = x.shape
    weight, bias = x.new_zeros(d, classes, requires_grad=True), x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=_GRADIENT,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels) + LOGISTIC_L2 / (2 * n) * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()
    left = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    solved, offset = weight.detach(), bias.detach()
    # Not "left > …": of features so large that the loss overflows, the gradient is NaN.
    return Fitted(lambda features: (scaling(features) @ solved + offset).argmax(dim=1), left <= 100 * _GRADIENT)


def nearest_neighbours(support: Tensor, labels: Tensor, classes: int, *, neighbours: int) -> Fitted:
    """Cosine similarity: the nearest `neighbours` (all, where there are fewer) vote exp(cosine / 0.07)."""
    directions = F.normalize(support.double(), dim=1)

    def predict(features: Tensor) -> Tensor:
        cosine = F.normalize(features.double(), dim=1) @ directions.T
        nearest, rows = cosine.topk(min(neighbours, len(directions)), dim=1)
        # Less the best's: the same votes up to a factor.
        votes = ((nearest - nearest[:, :1]) / TEMPERATURE).exp()
        return votes.new_zeros(len(votes), classes).scatter_add_(1, labels[rows], votes).argmax(dim=1)

    return Fitted(predict)


def nearest_mean(support: Tensor, labels: Tensor, classes: int) -> Fitted:
    """The class whose mean is nearest, Euclidean, in standardised features."""
    scaling = Scaling.of(support)
    counts = torch.bincount(labels, minlength=classes)[:, None]
    means = class_sums(scaling(support), labels, classes) / counts
    half_norms = means.square().sum(dim=1) / 2
    return Fitted(lambda features: (scaling(features) @ means.T - half_norms).argmax(dim=1))


# Beside ridge, which has a λ to be given.
OTHERS: dict[str, Probe] = {
    "logistic": logistic,
    "knn10": partial(nearest_neighbours, neighbours=10),
    "knn20": partial(nearest_neighbours, neighbours=20),
    "nearest_mean": nearest_mean,
}

DESCRIPTIONS = {
    "ridge": "standardised features and a constant column of 100, targets 2*onehot - 1, "
    "(X'X + l2*I) W = X'Y solved in closed form by one eigendecomposition, argmax",
    "logistic": "standardised features, softmax cross-entropy summed over the support set + l2/2*|W|^2, "
    f"l2 = {LOGISTIC_L2:g}, bias free, full-batch L-BFGS from zero to a mean gradient of {_GRADIENT:g}, "
    f"{_ITERATIONS} iterations at most",
    "knn10": f"10 nearest by cosine, votes exp(cosine / {TEMPERATURE})",
    "knn20": f"20 nearest by cosine, votes exp(cosine / {TEMPERATURE})",
    "nearest_mean": "nearest class mean, Euclidean, standardised features",
}
