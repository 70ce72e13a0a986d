"""Paired comparisons: which are made, and what their intervals are worth."""

from dataclasses import replace
from math import erf, sqrt

import numpy as np
import pytest

from fewshot.comparison import Side, compare, mean_interval
from fewshot.score import Result, Scores

LABELS = np.arange(200) % 2
SEEDS = (3, 1)


def scores(*rows, shots=(1, 5)):
    """Scores of rows (weights, features, probe, how many of the 200 images are right at one shot in the first draw).

    Each draw and number of shots after it has one image more, of those that stand next.
    """
    found = Scores()
    for weights, features, probe, right in rows:
        for at, (seed, k) in enumerate((seed, k) for seed in SEEDS for k in shots):
            classes = np.where(np.arange(200) < right + at, LABELS, 1 - LABELS).astype(np.uint8)
            row = Result(weights, probe, features, k, seed, None, (classes == LABELS).mean())
            found.results.append(row)
            found.predicted[row] = classes
    return found


def test_the_first_probe_on_the_first_feature_is_compared_with_each_other_one():
    found = scores(
        ("a", "tanh", "ridge", 100),
        ("a", "tanh", "knn10", 90),
        ("a", "cls", "ridge", 80),
        ("b", "cls", "ridge", 60),
        ("b", "cls", "knn10", 50),
        ("b", "mean", "ridge", 40),
    )
    features = [("b", "cls"), ("a", "tanh"), ("b", "cls"), ("b", "mean")]
    rows = compare(found, LABELS, features)
    assert {row.a for row in rows} == {Side("b", "cls", "ridge")}
    others = [("a", "tanh", "ridge"), ("b", "mean", "ridge"), ("b", "cls", "knn10")]
    assert [(row.b, row.shots) for row in rows] == [(Side(*other), shots) for other in others for shots in (1, 5)]
    assert compare(found, LABELS, []) == []


def test_a_comparison_is_of_the_same_draws():
    found = scores(("a", "given", "ridge", 100), ("a", "given", "knn10", 80))
    last = next(reversed(found.predicted))
    found.predicted[replace(last, accuracy=0.0, converged=False)] = 1 - LABELS  # the last draw of knn10 at 5 shots
    del found.predicted[last]
    one, five = compare(found, LABELS, [("a", "given")])
    assert (one.a, one.b) == (Side("a", "given", "ridge"), Side("a", "given", "knn10"))
    assert (one.difference, *one.draws) == pytest.approx((0.1, 0.1, 0.1))
    assert (one.low, one.high) == pytest.approx((0.06, 0.145), abs=0.006)
    assert one.converged
    assert five.draws == pytest.approx((0.1, 103 / 200))
    assert five.difference == pytest.approx((0.1 + 103 / 200) / 2)
    assert not five.converged


def test_of_equal_predictions_nothing_is_claimed():
    (one, _) = compare(
        scores(("a", "cls", "ridge", 50), ("a", "mean", "ridge", 50)), LABELS, [("a", "cls"), ("a", "mean")]
    )
    assert (one.difference, one.low, one.high, one.draws) == (0, 0, 0, (0, 0))


def test_the_interval_is_that_of_resampling_image_by_image():
    values = np.random.default_rng(5).choice([-3, -1, 0, 1, 2, 3], size=400, p=[0.05, 0.1, 0.5, 0.15, 0.1, 0.1])
    generator = np.random.default_rng(6)
    naive = [values[generator.integers(0, 400, 400)].mean() for _ in range(10_000)]
    # The noise of a 2.5 % percentile of 10,000 resamples: sqrt(.025 · .975 / 10,000) / density, .0267 of a deviation.
    noise = 0.0267 * values.std() / sqrt(400) * sqrt(2)
    assert mean_interval(values) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=4 * noise)


def test_the_other_way_round_the_interval_is_the_negative_one():
    for seed in range(5):
        values = np.random.default_rng(seed).integers(-3, 4, 300)
        low, high = mean_interval(values)
        assert low < values.mean() < high
        assert mean_interval(-values) == (-high, -low)


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch):
    """Images of different difficulty; networks whose three draws agree in part; b is the worse one by a shift."""
    monkeypatch.setattr("fewshot.comparison.RESAMPLES", 1000)
    generator, shift, noise, covered, cases = np.random.default_rng(0), 0.15, 0.8, 0, 1000
    truth = 3 * 0.5 * erf(shift / sqrt(1 + noise**2) / sqrt(2))
    for _ in range(cases):
        difficulty = generator.normal(size=(300, 1))
        a, b = (difficulty + noise * generator.normal(size=(300, 3)) > than for than in (0, shift))
        low, high = mean_interval((a.astype(int) - b).sum(axis=1))
        covered += low <= truth <= high
    assert 0.93 <= covered / cases <= 0.97
