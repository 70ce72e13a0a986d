"""What fitting a probe to a support set gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fitted:
    """A probe fitted to a support set: features [m, d] → classes int64 [m].

    Args:
        scores: features [m, d] → fp64 [m, classes]: the class of the largest is predicted, of equal ones the first.
        converged: False where training ended before its optimum.
        with_l2: the classifier for another λ, for a probe that is swept.
    """

    scores: Callable[[Tensor], Tensor]
    converged: bool = True
    with_l2: Callable[[float], Fitted] | None = None

    def __call__(self, features: Tensor) -> Tensor:
        return self.scores(features).argmax(dim=1)
