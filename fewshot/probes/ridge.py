"""The headline probe: regularised least squares in closed form, one eigendecomposition for every λ.

The paper fits "a regularised least-squares regression that maps the (frozen) representation of a subset of
training images to {-1, 1}^K target vectors". What it leaves open is settled as in big_vision's few-shot
evaluator: standardised features, a constant column of 100, λ = 2^10. Everything here is fp64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewshot.probes.fitted import Fitted

EPSILON = 1e-5  # added to the standard deviation: a feature that never varies stays finite
BIAS = 100.0  # the constant column; regularised like the rest, and so large that it hardly is
SWEEP = tuple(2.0**exponent for exponent in range(-10, 20))


@dataclass(frozen=True)
class Scaling:
    """Mean and population standard deviation + EPSILON of a support set, fp64 [d] each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, support: Tensor) -> Scaling:
        """Of features [n, d]."""
        support = support.double()
        return cls(support.mean(dim=0), support.std(dim=0, correction=0) + EPSILON)

    def __call__(self, x: Tensor) -> Tensor:
        """Features [n, d] → fp64 [n, d], standardised."""
        return (x.double() - self.mean) / self.std


def class_sums(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The sum of each class's rows: x [n, d], labels int64 [n] → [classes, d].

    Row after row in the order given: `index_add_` sums in no fixed order on an accelerator.
    """
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels, minlength=classes)
    return torch.stack([rows.sum(dim=0) for rows in x[order].split(counts.tolist())])


@dataclass(frozen=True)
class Decomposition:
    """X [n, d] and targets Y [n, k], decomposed so that one product solves (XᵀX + λI) W = XᵀY for any λ.

    XᵀX = q·diag(e)·qᵀ where n ≥ d, XXᵀ = q·diag(e)·qᵀ where n < d; r = min(n, d).
    """

    eigenvalues: Tensor  # e [r]
    lhs: Tensor  # [d, r]: q, or Xᵀq
    rhs: Tensor  # [r, k]: qᵀXᵀY, or qᵀY

    def weights(self, l2: float) -> Tensor:
        """W [d, k] = lhs · diag(1 / (e + λ)) · rhs; λ is not scaled by n."""
        return (self.lhs / (self.eigenvalues + l2)) @ self.rhs


def decompose(x: Tensor, labels: Tensor, classes: int) -> Decomposition:
    """Decompose x fp64 [n, d] against the targets 2·onehot - 1 of labels int64 [n].

    The targets are not written out: with S the sums of each class's rows, XᵀY = 2Sᵀ - Xᵀ1. Beside x this
    takes one copy of it and min(n, d)² numbers.
    """
    n, d = x.shape
    if n >= d:
        eigenvalues, q = torch.linalg.eigh(x.T @ x)
        return Decomposition(eigenvalues, q, q.T @ _times_targets(x, labels, classes))
    eigenvalues, q = torch.linalg.eigh(x @ x.T)
    return Decomposition(eigenvalues, x.T @ q, _times_targets(q, labels, classes))


@dataclass(frozen=True)
class Ridge:
    """The probe fitted on a support set, for every λ."""

    scaling: Scaling
    solved: Decomposition

    @classmethod
    def fit(cls, support: Tensor, labels: Tensor, classes: int) -> Ridge:
        """Fit on features [n, d] of classes int64 [n]."""
        scaling = Scaling.of(support)
        return cls(scaling, decompose(with_bias(scaling(support)), labels, classes))

    def classifier(self, l2: float) -> Fitted:
        """The classifier for λ = `l2`: its scores are x·W."""
        weights = self.solved.weights(l2)  # [d + 1, k]
        return Fitted(lambda x: with_bias(self.scaling(x)) @ weights)


def with_bias(x: Tensor) -> Tensor:
    """[n, d] → [n, d + 1]: the constant column last."""
    return torch.cat([x, x.new_full((len(x), 1), BIAS)], dim=1)


def _times_targets(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """xᵀY [d, k] for Y = 2·onehot(labels) - 1 and x [n, d]."""
    sums = class_sums(x, labels, classes)
    return (2 * sums - sums.sum(dim=0)).T


def fit_ridge(support: Tensor, labels: Tensor, classes: int, l2: float) -> Fitted:
    """Least squares to ±1 targets, closed form."""
    ridge = Ridge.fit(support, labels, classes)
    return replace(ridge.classifier(l2), with_l2=ridge.classifier)
