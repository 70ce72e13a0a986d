"""From features to accuracies."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewshot.cache import FeatureSet
from fewshot.config import ProtocolSection
from fewshot.probes import table as probes
from fewshot.probes.ridge import SWEEP
from fewshot.score import Result, Scores, predict, score, share_right, summarise
from fewshot.task import draw_support

CPU = torch.device("cpu")
PROBES = tuple(probes.PROBES)


def scored(digits, ids=None, leading=False, advance=lambda: None, **protocol):
    x, y, query_x, query_y = digits
    ids = np.arange(len(y)) if ids is None else ids
    section = ProtocolSection(**{"shots": (1, 5), "seeds": (0, 1), **protocol})
    draws = draw_support(y, classes=10, shots=section.shots, seeds=section.seeds, ids=ids)
    order = np.argsort(ids)
    features = FeatureSet(ids[order], x[order], query_x)
    return score(features, draws, query_y, 10, section, CPU, leading, advance)


def test_every_probe_is_scored_on_every_draw(digits):
    found = scored(digits)
    rows = {(row.probe, row.shots, row.seed) for row in found.results}
    assert rows == {(probe, shots, seed) for probe in PROBES for shots in (1, 5) for seed in (0, 1)}
    assert len(found.results) == len(rows)
    assert found.sweeps == []


def test_lambda_stands_where_there_is_one(digits):
    results = scored(digits, shots=(1,), seeds=(0,)).results
    assert {row.probe: row.l2 for row in results} == {
        "ridge": 1024.0, "ridge_held_out": 1024.0, "logistic": 1.0, "sgd": None, "knn10": None, "knn20": None,
        "nearest_mean": None,
    }  # fmt: skip


def test_permuting_rows_with_their_ids_changes_nothing(digits):
    x, y, query_x, query_y = digits
    shuffled = np.random.default_rng(3).permutation(len(y))
    mixed = (x[shuffled], y[shuffled], query_x, query_y)
    found, expected = scored(mixed, ids=shuffled), scored(digits)
    assert found.results == expected.results
    assert all((found.predicted[row] == classes).all() for row, classes in expected.predicted.items())


def test_the_sweep_goes_through_the_headline(digits):
    found = scored(digits, probes=("ridge",), leading=True, shots=(5,), seeds=(0,))
    (row,), (curve,) = found.results, found.sweeps
    assert curve.l2 == SWEEP
    assert curve.accuracy[SWEEP.index(1024.0)] == row.accuracy
    assert len(set(curve.accuracy)) > 5
    assert scored(digits, probes=("knn10",), leading=True, shots=(5,), seeds=(0,)).sweeps == [curve]
    assert scored(digits, leading=True, oracle=False).sweeps == []


def test_predictions_are_kept_of_the_first_probe_and_of_a_leading_features_others(digits):
    labels = digits[3]
    for leading in (False, True):
        found = scored(digits, leading=leading, oracle=False)
        kept = [row for row in found.results if leading or row.probe == "ridge"]
        assert list(found.predicted) == kept
        for row, classes in found.predicted.items():
            assert classes.dtype == np.uint8
            assert (classes == labels).mean() == row.accuracy


def test_predictions_are_added_under_the_names_of_their_weights_and_feature(digits):
    found, scores = scored(digits), Scores()
    scores.add(found, "w", "cls")
    scores.add(found, "w", "mean")
    for row in scores.results:
        original = replace(row, weights="", features="")
        assert scores.predicted.get(row) is found.predicted.get(original)
    assert len(scores.predicted) == 2 * len(found.predicted)


def test_every_query_is_classified_once_in_its_order():
    labels = np.arange(3000) % 7
    query = np.stack([labels, labels], axis=1).astype(np.float32)
    query[::10] += 1
    classes = predict(lambda x: x[:, 0].long(), query, CPU)
    assert (classes == query[:, 0]).all()
    assert share_right(classes, labels) == pytest.approx(0.9)


@pytest.mark.parametrize(("smallest", "within"), [(10**9, 1), (0, 2)])
def test_small_problems_take_one_thread_and_give_the_others_back(digits, monkeypatch, smallest, within):
    monkeypatch.setattr("fewshot.score._SMALL", smallest)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        scored(digits, probes=("ridge",), shots=(1,), seeds=(0,), advance=lambda: seen.append(torch.get_num_threads()))
        assert (seen, torch.get_num_threads()) == ([within], 2)
    finally:
        torch.set_num_threads(before)


def test_the_deviation_is_the_samples_with_ddof_1():
    values = [0.5, 0.6, 0.8]
    rows = [Result("w", "ridge", "cls", 5, seed, 1024.0, value) for seed, value in enumerate(values)]
    (mean,) = summarise(rows)
    assert mean.mean == pytest.approx(np.mean(values))
    assert mean.std == pytest.approx(np.std(values, ddof=1)) == statistics.stdev(values)


def test_a_single_seed_has_no_deviation():
    (mean,) = summarise([Result("w", "ridge", "cls", 5, 0, 1024.0, 0.5)])
    assert mean.std is None


def test_summaries_keep_apart_what_is_not_the_same():
    rows = [
        Result(weights, probe, feature, shots, 0, None, 0.5)
        for weights in "ab"
        for feature in ("tanh", "cls")
        for probe in ("ridge", "knn10")
        for shots in (1, 5)
    ]
    assert [(m.weights, m.features, m.probe, m.shots) for m in summarise(rows)] == [
        (row.weights, row.features, row.probe, row.shots) for row in rows
    ]


def test_a_probe_that_has_not_converged_is_told_in_its_row_and_in_the_mean(digits, monkeypatch):
    monkeypatch.setattr("fewshot.probes.logistic.ITERATIONS", 2)
    results = scored(digits, probes=("ridge", "logistic")).results
    assert {(row.probe, row.converged) for row in results} == {("ridge", True), ("logistic", False)}
    mixed = [replace(row, converged=row.seed == 0) for row in results if row.probe == "logistic"]
    assert {row.converged for row in summarise(mixed)} == {False}
    assert {row.converged for row in summarise(mixed[:1])} == {True}


def test_another_probe_is_one_entry_in_the_table(digits, monkeypatch):
    def fit(support, l2):
        return probes.Fitted(lambda features: torch.zeros(len(features), support.classes))

    monkeypatch.setitem(probes.PROBES, "first", probes.Probe("first", "always the first class", fit, l2=2.0))
    results = scored(digits, probes=("first",), shots=(1,), seeds=(0,)).results
    expected = Result("", "first", "", 1, 0, 2.0, float((digits[3] == 0).mean()))
    assert results == [expected]


@pytest.mark.parametrize("leading", [True, False])
def test_each_draw_is_decomposed_once(digits, monkeypatch, leading):
    eigh, made = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda x, **options: made.append(len(x)) or eigh(x, **options))
    scored(digits, probes=("ridge", "ridge_held_out", "nearest_mean"), leading=leading)
    assert made == [10, 50] * 2  # 1 and 5 shots, fewer than the 65 columns


@pytest.mark.long
def test_imagenets_shape_is_decomposed_once_a_draw(monkeypatch):
    """25,000 × 1,280, 1,000 classes, 12 draws; timed by benchmarks/probes.py."""
    eigh, made = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda x, **options: made.append(len(x)) or eigh(x, **options))
    generator, labels = np.random.default_rng(0), np.arange(26_000) % 1000
    section = ProtocolSection(probes=("ridge", "ridge_held_out"))
    draws = draw_support(labels, classes=1000, shots=section.shots, seeds=section.seeds)
    means = generator.normal(size=(1000, 1280)).astype(np.float32)
    support, query = (
        means[y] + generator.normal(0, 3, (len(y), 1280)).astype(np.float32) for y in (labels, labels[:2000])
    )
    found = score(FeatureSet(np.arange(26_000), support, query), draws, labels[:2000], 1000, section, CPU, True)
    assert made == [1000, 1281, 1281, 1281] * 3
    assert {len(curve.accuracy) for curve in found.sweeps} == {30}
    chosen = {row.shots: row.accuracy for row in found.results if row.probe == "ridge_held_out" and row.seed == 0}
    assert chosen[25] > chosen[5] > chosen[1] > 0.1
