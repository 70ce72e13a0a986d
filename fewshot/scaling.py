"""Features standardised by their support set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-5  # added to the standard deviation: a feature that never varies stays finite


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
