"""The linear layer trained by SGD."""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from torch import Tensor

from fewshot.probes.fitted import Fitted
from fewshot.probes.support import Support

STEPS, BATCH, MOMENTUM, LR, SEED = 500, 256, 0.9, 1.0, 0


def fit_sgd(support: Support, l2: float) -> Fitted:
    """One linear layer under softmax cross-entropy, by STEPS steps of SGD from zero. No λ, no weight decay.

    Mini-batches of BATCH images (all, where there are fewer) run through one permutation after another of numpy's
    default_rng(SEED). The learning rate begins at LR · √classes / d and falls to zero along a cosine: standardised
    features of width d have a squared norm of d, by which the curvature of the loss grows; of more classes each has
    fewer images in a batch. The recipe is fixed, so it does not say whether it has converged.
    """
    x, labels = support.scaled, support.labels
    n, d = x.shape
    size = min(BATCH, n)
    weight, bias = x.new_zeros(d, support.classes), x.new_zeros(support.classes)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = LR * sqrt(support.classes) / d * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS)) / 2
    for rows, rate in zip(_batches(n, size, x.device), rates.tolist(), strict=True):
        batch = x[rows]
        # The gradient of the mean cross-entropy in the scores: softmax - onehot, over the images.
        slope = torch.addmm(bias, batch, weight).softmax(dim=1)
        slope.scatter_add_(1, labels[rows, None], slope.new_full((size, 1), -1.0)).div_(size)
        speeds[0].mul_(MOMENTUM).addmm_(batch.T, slope)
        speeds[1].mul_(MOMENTUM).add_(slope.sum(dim=0))
        weight.sub_(speeds[0], alpha=rate)
        bias.sub_(speeds[1], alpha=rate)
    return Fitted(support.scaling.linear(weight, bias))


def _batches(n: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """The rows of each step, int64 [size] each."""
    generator = np.random.default_rng(SEED)
    passes = -(-STEPS * size // n)
    rows = np.concatenate([generator.permutation(n) for _ in range(passes)])[: STEPS * size]
    return torch.from_numpy(rows).to(device).split(size)
