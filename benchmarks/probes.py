"""Seconds of the few-shot probes at ImageNet's shape, the ridge against scikit-learn's on the same matrices.

    python benchmarks/probes.py [--draws 12] [--rounds 3] [--probes ridge ridge_held_out] [--device cpu]

Synthetic features of 1,000 classes, width 1,280; support sets of 1, 5, 10 and 25 images of a class in seeds 0, 1, 2;
50,000 query images. Everything is fp64. First one support set of the most shots, in rounds, interleaved: the ridge
from features to classifier for one λ and for 30, scikit-learn's Ridge for one λ; after them the other probes, once.
Then all draws as a report scores them; the eigendecompositions made are counted. JSON: runs/bench/probes.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from benchmarks.table import print_table, save, spread
from fewshot.cache import FeatureSet
from fewshot.config import ProtocolSection
from fewshot.probes.ridge import SWEEP, fit_ridge, fit_ridge_held_out
from fewshot.probes.sgd import fit_sgd
from fewshot.probes.support import Support
from fewshot.probes.table import PROBES
from fewshot.score import predict, score
from fewshot.task import Draw, draw_support
from pretrain.progress import Progress

SHOTS, SEEDS, L2 = (1, 5, 10, 25), (0, 1, 2), 1024.0
Way = Callable[[], Any]

ONE, MANY, THEIRS = "one λ", f"{len(SWEEP)} λ", "scikit-learn, one λ"
POOL = 28  # images of a class to draw from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--draws", type=int, default=12, help="of the twelve, seed by seed")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--probes", nargs="+", choices=tuple(PROBES), default=["ridge", "ridge_held_out"])
    parser.add_argument("--oracle", action="store_true", help="score the ridge for all 30 λ as well")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    features, pool_labels, query_labels = synthetic(args)
    draws = draw_support(pool_labels, classes=args.classes, shots=SHOTS, seeds=SEEDS)
    largest = max(draws, key=lambda draw: draw.shots)
    draws = draws[: args.draws]
    seconds = compare(features, largest, args, device)
    print_table(
        f"{len(largest.ids):,} × {args.width:,}, {args.classes:,} classes, fp64, {device}: seconds",
        ("", "median", "low – high"),
        [(name, *spread(found, ".2f")) for name, found in seconds.items()],
    )
    one, many, theirs = (statistics.median(seconds[name]) for name in (ONE, MANY, THEIRS))
    ratios = {"many_to_one": many / one, "scikit_learn_to_one_of_many": theirs * len(SWEEP) / many}
    print(
        "{many_to_one:.2f} × one λ for 30; scikit-learn {scikit_learn_to_one_of_many:.1f} × a λ of 30".format(**ratios)
    )
    whole = score_draws(features, draws, query_labels, args, device)
    print_table(
        f"{len(draws)} draws, {args.queries:,} query images, {' '.join(args.probes)}{' oracle' * args.oracle}",
        ("wall seconds", "eigendecompositions", "peak memory, GiB"),
        [(f"{whole['seconds']:.0f}", str(whole["eigendecompositions"]), f"{whole['peak_memory_gib']:.1f}")],
        names=0,
    )
    threads = torch.get_num_threads()
    save("probes", {"arguments": vars(args), "threads": threads, "compared": seconds, **ratios, "whole": whole})


def synthetic(args: argparse.Namespace) -> tuple[FeatureSet, NDArray[np.int64], NDArray[np.int64]]:
    """Float32 features of overlapping classes, whose spectrum falls as a network's does; pool and query labels."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, args.width + 1) ** -0.5
    means = torch.randn(args.classes, args.width, generator=generator) * spectrum
    pool, query = torch.arange(args.classes).repeat_interleave(POOL), torch.arange(args.queries) % args.classes
    support_x, query_x = (
        means[labels] + 2 * spectrum * torch.randn(len(labels), args.width, generator=generator)
        for labels in (pool, query)
    )
    return FeatureSet(np.arange(len(pool)), support_x.numpy(), query_x.numpy()), pool.numpy(), query.numpy()


def compare(features: FeatureSet, draw: Draw, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way, in turn, from the drawn features to weights on features as they are."""
    rows, labels = torch.from_numpy(features.rows(draw.ids)).to(device), torch.from_numpy(draw.labels).to(device)
    design = Support(rows, labels, args.classes).design.cpu().numpy()
    targets = 2 * np.eye(args.classes)[draw.labels] - 1

    def fit(*strengths: float) -> float:
        support = Support(rows, labels, args.classes)
        return sum(float(fit_ridge(support, l2).scores.bias[0]) for l2 in strengths)  # waits for the device

    fitted = fit_ridge(Support(rows, labels, args.classes), L2)
    ways: dict[str, Way] = {
        ONE: lambda: fit(L2),
        MANY: lambda: fit(*SWEEP),
        THEIRS: lambda: Ridge(alpha=L2, fit_intercept=False).fit(design, targets),
    }
    once: dict[str, Way] = {
        "λ by leave-one-out": lambda: fit_ridge_held_out(Support(rows, labels, args.classes), L2),
        "sgd": lambda: float(fit_sgd(Support(rows, labels, args.classes), 0.0).scores.bias[0]),
        "query images, one λ": lambda: predict(fitted, features.query, device),
    }
    seconds = {name: [] for name in ways}
    with Progress("ridge", "rounds", args.rounds) as progress:
        for number in range(args.rounds):
            for name in list(ways)[:: 1 if number % 2 else -1]:
                seconds[name].append(timed(ways[name]))
            progress.advance()
    return seconds | {name: [timed(way)] for name, way in once.items()}


def timed(way: Way) -> float:
    """Seconds that a way takes."""
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def score_draws(
    features: FeatureSet, draws: tuple[Draw, ...], labels: NDArray[np.int64], args: argparse.Namespace, device: Any
) -> dict[str, Any]:
    """All draws by `score`: wall seconds, of each draw and together; decompositions made."""
    protocol = ProtocolSection(probes=tuple(args.probes), oracle=args.oracle)
    ends = [time.perf_counter()]
    with Progress("probes", "support sets", len(draws)) as progress, counted_decompositions() as made:

        def advance() -> None:
            ends.append(time.perf_counter())
            progress.advance()

        scores = score(features, draws, labels, args.classes, protocol, device, args.oracle, advance)
    return {
        "seconds": ends[-1] - ends[0],
        "seconds_of_draws": [
            {"shots": draw.shots, "seed": draw.seed, "seconds": end - begin}
            for draw, begin, end in zip(draws, ends, ends[1:], strict=False)
        ],
        "eigendecompositions": len(made),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # of the process so far
        "accuracy": [[row.probe, row.shots, row.seed, row.l2, row.accuracy] for row in scores.results],
    }


@contextmanager
def counted_decompositions() -> Iterator[list[int]]:
    """A list that holds the size of each eigendecomposition made inside the block."""
    made, eigh = [], torch.linalg.eigh

    def counting(x: torch.Tensor, **options: Any) -> Any:
        made.append(len(x))
        return eigh(x, **options)

    torch.linalg.eigh = counting
    try:
        yield made
    finally:
        torch.linalg.eigh = eigh


if __name__ == "__main__":
    main()
