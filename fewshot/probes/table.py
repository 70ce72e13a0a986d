"""The table of probes, by the names that configs and reports use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log2

from fewshot.probes.fitted import Fitted
from fewshot.probes.logistic import GRADIENT, ITERATIONS, LOGISTIC_L2, fit_logistic
from fewshot.probes.neighbours import TEMPERATURE, fit_nearest_mean, fit_neighbours
from fewshot.probes.ridge import SWEEP, fit_ridge, fit_ridge_held_out
from fewshot.probes.sgd import BATCH, LR, MOMENTUM, SEED, STEPS, fit_sgd
from fewshot.probes.support import Support


@dataclass(frozen=True)
class Probe:
    """One probe.

    Args:
        name: in configs and reports.
        description: in reports and in `--help`.
        fit: support set, λ → the classifier.
        l2: its λ, where that is fixed; it was chosen beforehand, not on query images.
        configured: whether it takes the config's λ instead. A probe with neither has none.
        chosen: whether `fit` chooses λ on the support set; where it cannot, it takes the one that it is given.
        sweep: the λ of the oracle's curve, for which `fit` must give `with_l2`.
        linear: whether its scores are `Linear`, so that its fits can be saved.
    """

    name: str
    description: str
    fit: Callable[[Support, float], Fitted]
    l2: float | None = None
    configured: bool = False
    chosen: bool = False
    sweep: tuple[float, ...] = ()
    linear: bool = False


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
            linear=True,
        ),
        Probe(
            "ridge_held_out",
            f"the ridge with the l2, of 2^{log2(SWEEP[0]):g} to 2^{log2(SWEEP[-1]):g}, that predicts most support "
            "images when each is left out of the solution in turn (mean and deviation of all), of as many the one of "
            "least squared error, then the largest; at 1 shot, which leaves a class no other image, the l2 of ridge",
            fit_ridge_held_out,
            configured=True,
            chosen=True,
            linear=True,
        ),
        Probe(
            "logistic",
            "standardised features, softmax cross-entropy summed over the support set + l2/2*|W|^2, "
            f"l2 = {LOGISTIC_L2:g}, bias free, full-batch L-BFGS from zero to a mean gradient of {GRADIENT:g}, "
            f"{ITERATIONS} iterations at most",
            fit_logistic,
            l2=LOGISTIC_L2,
            linear=True,
        ),
        Probe(
            "sgd",
            f"the same layer trained by {STEPS:,} steps of SGD from zero: standardised features, mean softmax "
            f"cross-entropy of {BATCH} images (all, where there are fewer), momentum {MOMENTUM:g}, learning rate "
            f"{LR:g}*sqrt(classes)/d for features of width d, cosine to 0, no weight decay, batches in the order of "
            f"numpy default_rng({SEED})",
            fit_sgd,
            linear=True,
        ),
        *(
            Probe(
                f"knn{neighbours}",
                f"{neighbours} nearest by cosine, votes exp(cosine / {TEMPERATURE})",
                partial(fit_neighbours, neighbours=neighbours),
            )
            for neighbours in (10, 20)
        ),
        Probe("nearest_mean", "nearest class mean, Euclidean, standardised features", fit_nearest_mean, linear=True),
    )
}
SWEPT = next(probe for probe in PROBES.values() if probe.sweep)  # the oracle's
