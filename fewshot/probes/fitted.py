"""What fitting a probe to a support set gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Scores that are linear in features as the network gives them: x·weight + bias, fp64 [d, classes] and [classes].

    A probe on standardised features is one too: their mean and deviation are folded into both.
    """

    weight: Tensor
    bias: Tensor

    def to(self, device: torch.device) -> Linear:
        return Linear(self.weight.to(device), self.bias.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        return torch.addmm(self.bias, features.double(), self.weight)


@dataclass(frozen=True)
class Fitted:
    """A probe fitted to a support set: features [m, d] → classes int64 [m].

    Args:
        scores: features [m, d] → fp64 [m, classes]: the class of the largest is predicted, of equal ones the first.
        l2: the λ that the fit has chosen itself; None where it was told or has none.
        converged: False where training ended before its optimum.
        with_l2: the classifier for another λ, for a probe that is swept.
    """

    scores: Callable[[Tensor], Tensor]
    l2: float | None = None
    converged: bool = True
    with_l2: Callable[[float], Fitted] | None = None

    @property
    def linear(self) -> Linear | None:
        """The scores of a linear probe; None of another."""
        return self.scores if isinstance(self.scores, Linear) else None

    def __call__(self, features: Tensor) -> Tensor:
        return self.scores(features).argmax(dim=1)
