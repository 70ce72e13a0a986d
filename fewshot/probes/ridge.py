"""The headline probe: regularised least squares in closed form, one eigendecomposition for every λ.

The paper fits "a regularised least-squares regression that maps the (frozen) representation of a subset of
training images to {-1, 1}^K target vectors". What it leaves open is settled as in big_vision's few-shot
evaluator: standardised features, a constant column of 100, λ = 2^10. Everything here is fp64.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from fewshot.probes.fitted import Fitted
from fewshot.probes.support import BIAS, Support

SWEEP = tuple(2.0**exponent for exponent in range(-10, 20))


def fit_ridge(support: Support, l2: float) -> Fitted:
    """Least squares to ±1 targets, closed form."""
    return replace(_classifier(support, l2), with_l2=partial(_classifier, support))


def fit_ridge_held_out(support: Support, l2: float) -> Fitted:
    """The ridge with the λ of SWEEP that predicts most support images left out of the fit, each by all others.

    Of λ with as many correct the one of the least squared error, then the largest. Mean and deviation are those of the
    whole support set, so the errors are exact for the standardised features, and no other solve is needed. Where a
    class has a single image, none is left of it to predict that image from: λ is `l2`.
    """
    if int(torch.bincount(support.labels, minlength=support.classes).min()) < 2:
        return replace(_classifier(support, l2), l2=l2)
    right, errors = support.decomposition.leave_one_out(support.design, support.labels, SWEEP)
    _, _, chosen = max(zip(right.tolist(), (-errors).tolist(), SWEEP, strict=True))
    return replace(_classifier(support, chosen), l2=chosen)


def _classifier(support: Support, l2: float) -> Fitted:
    """The classifier for λ = `l2`: its scores are x·W."""
    weights = support.decomposition.weights(l2)  # [d + 1, k]
    return Fitted(support.scaling.linear(weights[:-1], BIAS * weights[-1]))
