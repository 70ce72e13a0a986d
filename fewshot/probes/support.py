"""A support set, and what several probes need of it, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewshot.probes.decomposition import Decomposition, decompose
from fewshot.probes.fitted import Linear

EPSILON = 1e-5  # added to the standard deviation: a feature that never varies stays finite
BIAS = 100.0  # the constant column; regularised like the rest, and so large that it hardly is


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

    def linear(self, weight: Tensor, bias: Tensor) -> Linear:
        """Features as they are → what `weight` [d, k] and `bias` [k] make of standardised ones."""
        folded = weight / self.std[:, None]
        return Linear(folded, bias - self.mean @ folded)


@dataclass(frozen=True)
class Support:
    """A support set that probes are fitted to: features [n, d] of classes int64 [n] in 0 … classes-1."""

    features: Tensor
    labels: Tensor
    classes: int

    @cached_property
    def scaling(self) -> Scaling:
        return Scaling.of(self.features)

    @cached_property
    def scaled(self) -> Tensor:
        """The features standardised, fp64 [n, d]."""
        return self.scaling(self.features)

    @property
    def design(self) -> Tensor:
        """The ridge's X, fp64 [n, d + 1]: standardised features and the constant column."""
        return with_bias(self.scaled)

    @cached_property
    def decomposition(self) -> Decomposition:
        """The design decomposed, for every λ and every probe that solves the ridge."""
        return decompose(self.design, self.labels, self.classes)


def with_bias(x: Tensor) -> Tensor:
    """[n, d] → [n, d + 1]: the constant column last."""
    return torch.cat([x, x.new_full((len(x), 1), BIAS)], dim=1)
