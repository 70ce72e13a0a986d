"""The logistic probe."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fewshot.probes.fitted import Fitted
from fewshot.probes.support import Support

LOGISTIC_L2 = 1.0
ITERATIONS, GRADIENT = 1000, 1e-6


def fit_logistic(support: Support, l2: float) -> Fitted:
    """One linear layer under softmax cross-entropy, trained to its optimum: full-batch L-BFGS from zero.

    Minimises Σᵢ CE(Wxᵢ + b, yᵢ) + λ/2·‖W‖² on standardised features, b free: with λ = 1 what scikit-learn's
    LogisticRegression does by default (C = 1). Converged is a mean gradient of at most 100 · GRADIENT after at most
    ITERATIONS.
    """
    x, labels, classes = support.scaled, support.labels, support.classes
    n, d = x.shape
    weight, bias = x.new_zeros(d, classes, requires_grad=True), x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=GRADIENT,
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
    scores = support.scaling.linear(weight.detach(), bias.detach())
    # Not "left > …": of features so large that the loss overflows, the gradient is NaN.
    return Fitted(scores, converged=left <= 100 * GRADIENT)
