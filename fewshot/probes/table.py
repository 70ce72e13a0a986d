"""The table of probes, by the names that configs and reports use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fewshot.probes.fitted import Fitted
from fewshot.probes.logistic import GRADIENT, ITERATIONS, LOGISTIC_L2, fit_logistic
from fewshot.probes.neighbours import TEMPERATURE, fit_nearest_mean, fit_neighbours
from fewshot.probes.ridge import SWEEP, fit_ridge


@dataclass(frozen=True)
class Probe:
    """One probe.

    Args:
        name: in configs and reports.
        description: in reports and in `--help`.
        fit: support features [n, d], labels int64 [n], number of classes, λ → the classifier.
        l2: its λ, where that is fixed; it was chosen beforehand, not on query images.
        configured: whether it takes the config's λ instead. A probe with neither has none.
        sweep: the λ of the oracle's curve, for which `fit` must give `with_l2`.
    """

    name: str
    description: str
    fit: Callable[[Tensor, Tensor, int, float], Fitted]
    l2: float | None = None
    configured: bool = False
    sweep: tuple[float, ...] = ()


# Another probe is another entry here, and nothing else: configs, reports and help read this table.
PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        Probe(
            "ridge",
            "standardised features and a constant column of 100, targets 2*onehot - 1, "
            "(X'X + l2*I) W = X'Y solved in closed form by one eigendecomposition, argmax",
            fit_ridge,
            configured=True,
            sweep=SWEEP,
        ),
        Probe(
            "logistic",
            "standardised features, softmax cross-entropy summed over the support set + l2/2*|W|^2, "
            f"l2 = {LOGISTIC_L2:g}, bias free, full-batch L-BFGS from zero to a mean gradient of {GRADIENT:g}, "
            f"{ITERATIONS} iterations at most",
            fit_logistic,
            l2=LOGISTIC_L2,
        ),
        *(
            Probe(
                f"knn{neighbours}",
                f"{neighbours} nearest by cosine, votes exp(cosine / {TEMPERATURE})",
                partial(fit_neighbours, neighbours=neighbours),
            )
            for neighbours in (10, 20)
        ),
        Probe("nearest_mean", "nearest class mean, Euclidean, standardised features", fit_nearest_mean),
    )
}
SWEPT = next(probe for probe in PROBES.values() if probe.sweep)  # the oracle's
