"""Regularised least squares for every λ, and its leave-one-out errors, by one eigendecomposition. fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.model.arithmetic import threads

_ROWS = 1024  # left out at once
_COLUMNS = 320  # of a block of a Gram matrix


@dataclass(frozen=True)
class Decomposition:
    """X [n, d] and targets Y [n, k], decomposed so that one product solves (XᵀX + λI) W = XᵀY for any λ.

    XᵀX = q·diag(e)·qᵀ where n ≥ d, XXᵀ = q·diag(e)·qᵀ where n < d; r = min(n, d).
    """

    eigenvalues: Tensor  # e [r]
    q: Tensor  # [r, r]
    lhs: Tensor  # [d, r]: q, or Xᵀq
    rhs: Tensor  # [r, k]: qᵀXᵀY, or qᵀY

    def weights(self, l2: float) -> Tensor:
        """W [d, k] = lhs · diag(1 / (e + λ)) · rhs; λ is not scaled by n."""
        return (self.lhs / (self.eigenvalues + l2)) @ self.rhs

    def leave_one_out(self, x: Tensor, labels: Tensor, l2: Sequence[float]) -> tuple[Tensor, Tensor]:
        """How well each row of X is predicted by the solution of all others: correct rows and squared error, by λ.

        With H = X(XᵀX + λI)⁻¹Xᵀ, row i left out has the residual (Y - HY)ᵢ / (1 - Hᵢᵢ): exactly that of a solution
        without the row (Allen 1974). Where n < d, both are divided by λ: with G = XXᵀ + λI, (G⁻¹Y)ᵢ / (G⁻¹)ᵢᵢ.

        Args:
            x, labels: those that were decomposed.
            l2: the λ asked for.

        Returns:
            int64 and fp64 [len(l2)]. The squared error is summed over rows and classes.
        """
        n, d = x.shape
        right = torch.zeros(len(l2), dtype=torch.int64, device=x.device)
        errors = x.new_zeros(len(l2))
        for begin in range(0, n, _ROWS):
            own = labels[begin : begin + _ROWS, None]
            rows = x[begin : begin + _ROWS] @ self.q if n >= d else self.q[begin : begin + _ROWS]
            squares = rows.square()
            for at, strength in enumerate(l2):
                shrunk = 1 / (self.eigenvalues + strength)
                left, weight = (rows * shrunk) @ self.rhs, squares @ shrunk
                if n >= d:  # from HY and Hᵢᵢ to Y - HY and 1 - Hᵢᵢ
                    left, weight = _add_targets(-left, own), 1 - weight
                residuals = left / weight[:, None]
                errors[at] += residuals.square().sum()
                predicted = _add_targets(-residuals, own).argmax(dim=1)
                right[at] += (predicted == own[:, 0]).sum()
        return right, errors


def decompose(x: Tensor, labels: Tensor, classes: int) -> Decomposition:
    """Decompose x fp64 [n, d] against the targets 2·onehot - 1 of labels int64 [n].

    The targets are not written out: with S the sums of each class's rows, XᵀY = 2Sᵀ - Xᵀ1. Beside x this
    takes one copy of it and min(n, d)² numbers.
    """
    n, d = x.shape
    if n >= d:
        eigenvalues, q = _eigh(_gram(x))
        return Decomposition(eigenvalues, q, q, q.T @ _times_targets(x, labels, classes))
    eigenvalues, q = _eigh(_gram(x.T))
    return Decomposition(eigenvalues, q, x.T @ q, _times_targets(q, labels, classes))


def class_sums(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The sum of each class's rows: x [n, d], labels int64 [n] → [classes, d].

    Row after row in the order given: `index_add_` sums in no fixed order on an accelerator.
    """
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels, minlength=classes)
    return torch.stack([rows.sum(dim=0) for rows in x[order].split(counts.tolist())])


def _times_targets(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """xᵀY [d, k] for Y = 2·onehot(labels) - 1 and x [n, d]."""
    sums = class_sums(x, labels, classes)
    return (2 * sums - sums.sum(dim=0)).T


def _add_targets(x: Tensor, own: Tensor) -> Tensor:
    """x [b, k] + Y, in place: -1, and +1 at each row's own class [b, 1]."""
    return x.sub_(1).scatter_add_(1, own, x.new_full(own.shape, 2.0))


def _gram(x: Tensor) -> Tensor:
    """xᵀx [d, d] of x [n, d], block by block and without what is above the diagonal's: two thirds of the work."""
    gram = x.new_zeros(x.shape[1], x.shape[1])
    for begin in range(0, len(gram), _COLUMNS):
        end = min(begin + _COLUMNS, len(gram))
        gram[begin:end, :end] = x[:, begin:end].T @ x[:, :end]
    return gram


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, in columns, of a symmetric matrix whose lower triangle is given.

    On one thread of the CPU: more change digits, and are no faster.
    """
    with threads(1):
        eigenvalues, vectors = torch.linalg.eigh(gram, UPLO="L")
        return eigenvalues, vectors
