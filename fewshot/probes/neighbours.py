"""The probes without training: nearest neighbours and nearest class mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewshot.probes.decomposition import class_sums
from fewshot.probes.fitted import Fitted
from fewshot.probes.support import Support

TEMPERATURE = 0.07  # of the neighbours' votes: Wu et al. 2018, Caron et al. 2021


def fit_neighbours(support: Support, l2: float, *, neighbours: int) -> Fitted:
    """Cosine similarity: the nearest `neighbours` (all, where there are fewer) vote exp(cosine / 0.07). No λ."""
    directions = F.normalize(support.features.double(), dim=1)

    def scores(features: Tensor) -> Tensor:
        cosine = F.normalize(features.double(), dim=1) @ directions.T
        nearest, rows = cosine.topk(min(neighbours, len(directions)), dim=1)
        # Relative to the best: the same votes up to a factor.
        votes = ((nearest - nearest[:, :1]) / TEMPERATURE).exp()
        return votes.new_zeros(len(votes), support.classes).scatter_add_(1, support.labels[rows], votes)

    return Fitted(scores)


def fit_nearest_mean(support: Support, l2: float) -> Fitted:
    """The class whose mean is nearest, Euclidean, in standardised features. No λ."""
    counts = torch.bincount(support.labels, minlength=support.classes)[:, None]
    means = class_sums(support.scaled, support.labels, support.classes) / counts
    return Fitted(support.scaling.linear(means.T, -means.square().sum(dim=1) / 2))
