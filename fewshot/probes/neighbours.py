"""The probes without training: nearest neighbours and nearest class mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewshot.probes.fitted import Fitted
from fewshot.probes.ridge import Scaling, class_sums

TEMPERATURE = 0.07  # of the neighbours' votes: Wu et al. 2018, Caron et al. 2021


def fit_neighbours(support: Tensor, labels: Tensor, classes: int, l2: float, *, neighbours: int) -> Fitted:
    """Cosine similarity: the nearest `neighbours` (all, where there are fewer) vote exp(cosine / 0.07). No λ."""
    directions = F.normalize(support.double(), dim=1)

    def scores(features: Tensor) -> Tensor:
        cosine = F.normalize(features.double(), dim=1) @ directions.T
        nearest, rows = cosine.topk(min(neighbours, len(directions)), dim=1)
        # Relative to the best: the same votes up to a factor.
        votes = ((nearest - nearest[:, :1]) / TEMPERATURE).exp()
        return votes.new_zeros(len(votes), classes).scatter_add_(1, labels[rows], votes)

    return Fitted(scores)


def fit_nearest_mean(support: Tensor, labels: Tensor, classes: int, l2: float) -> Fitted:
    """The class whose mean is nearest, Euclidean, in standardised features. No λ."""
    scaling = Scaling.of(support)
    counts = torch.bincount(labels, minlength=classes)[:, None]
    means = class_sums(scaling(support), labels, classes) / counts
    half_norms = means.square().sum(dim=1) / 2
    return Fitted(lambda features: scaling(features) @ means.T - half_norms)
