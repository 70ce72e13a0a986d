"""The probes: classifiers that are fitted to the frozen features of a support set. All fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fewshot.ridge import SWEEP, Ridge, Scaling, class_sums

TEMPERATURE = 0.07  # of the neighbours' votes: Wu et al. 2018, Caron et al. 2021
LOGISTIC_L2 = 1.0
_ITERATIONS, _GRADIENT = 1000, 1e-6

Predictor = Callable[[Tensor], Tensor]  # features [m, d] → classes int64 [m]


@dataclass(frozen=True)
class Fitted:
    """A probe fitted to a support set: features [m, d] → classes int64 [m].

    Args:
        predict: the classifier.
        converged: False where training ended before its optimum.
        with_l2: the classifier for another λ, for a probe that is swept.
    """

    predict: Predictor
    converged: bool = True
    with_l2: Callable[[float], Predictor] | None = None

    def __call__(self, features: Tensor) -> Tensor:
        return self.predict(features)


def fit_ridge(support: Tensor, labels: Tensor, classes: int, l2: float) -> Fitted:
    """Least squares to ±1 targets, closed form: `fewshot.ridge`."""
    ridge = Ridge.fit(support, labels, classes)
    return Fitted(ridge.predictor(l2), with_l2=ridge.predictor)


def fit_logistic(support: Tensor, labels: Tensor, classes: int, l2: float) -> Fitted:
    """One linear layer under softmax cross-entropy, trained to its optimum: full-batch L-BFGS from zero.

    Minimises Σᵢ CE(Wxᵢ + b, yᵢ) + λ/2·‖W‖² on standardised features, b free: with λ = 1 what scikit-learn's
    LogisticRegression does by default (C = 1). Converged is a mean gradient of at most 100 · _GRADIENT after at most
    _ITERATIONS.
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
        value = F.cross_entropy(x @ weight + bias, labels) + l2 / (2 * n) * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()
    left = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    solved, offset = weight.detach(), bias.detach()
    # Not "left > …": of features so large that the loss overflows, the gradient is NaN.
    return Fitted(lambda features: (scaling(features) @ solved + offset).argmax(dim=1), left <= 100 * _GRADIENT)


def fit_neighbours(support: Tensor, labels: Tensor, classes: int, l2: float, *, neighbours: int) -> Fitted:
    """Cosine similarity: the nearest `neighbours` (all, where there are fewer) vote exp(cosine / 0.07). No λ."""
    directions = F.normalize(support.double(), dim=1)

    def predict(features: Tensor) -> Tensor:
        cosine = F.normalize(features.double(), dim=1) @ directions.T
        nearest, rows = cosine.topk(min(neighbours, len(directions)), dim=1)
        # Relative to the best: the same votes up to a factor.
        votes = ((nearest - nearest[:, :1]) / TEMPERATURE).exp()
        return votes.new_zeros(len(votes), classes).scatter_add_(1, labels[rows], votes).argmax(dim=1)

    return Fitted(predict)


def fit_nearest_mean(support: Tensor, labels: Tensor, classes: int, l2: float) -> Fitted:
    """The class whose mean is nearest, Euclidean, in standardised features. No λ."""
    scaling = Scaling.of(support)
    counts = torch.bincount(labels, minlength=classes)[:, None]
    means = class_sums(scaling(support), labels, classes) / counts
    half_norms = means.square().sum(dim=1) / 2
    return Fitted(lambda features: (scaling(features) @ means.T - half_norms).argmax(dim=1))


@dataclass(frozen=True)
class Probe:
    """One probe.

    Args:
        name: in configs and reports.
        description: in reports and in `--help`.
        fit: support features [n, d], labels int64 [n], number of classes, λ → the classifier.
        l2: its λ, where that is fixed; it was chosen beforehand, not on query images.
        configured: whether it takes the config's λ instead. A probe with neither has none.
        sweep: the λ of the oracle's curve, for which `fit` must give `with_l2`.
    """

    name: str
    description: str
    fit: Callable[[Tensor, Tensor, int, float], Fitted]
    l2: float | None = None
    configured: bool = False
    sweep: tuple[float, ...] = ()


# Another probe is another entry here, and nothing else: configs, reports and help read this table.
PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Probe(
            "ridge",
            "standardised features and a constant column of 100, targets 2*onehot - 1, "
            "(X'X + l2*I) W = X'Y solved in closed form by one eigendecomposition, argmax",
            fit_ridge,
            configured=True,
            sweep=SWEEP,
        ),
        Probe(
            "logistic",
            "standardised features, softmax cross-entropy summed over the support set + l2/2*|W|^2, "
            f"l2 = {LOGISTIC_L2:g}, bias free, full-batch L-BFGS from zero to a mean gradient of {_GRADIENT:g}, "
            f"{_ITERATIONS} iterations at most",
            fit_logistic,
            l2=LOGISTIC_L2,
        ),
        *(
            Probe(
                f"knn{neighbours}",
                f"{neighbours} nearest by cosine, votes exp(cosine / {TEMPERATURE})",
                partial(fit_neighbours, neighbours=neighbours),
            )
            for neighbours in (10, 20)
        ),
        Probe("nearest_mean", "nearest class mean, Euclidean, standardised features", fit_nearest_mean),
    )
}
SWEPT = next(probe for probe in PROBES.values() if probe.sweep)  # the oracle's
