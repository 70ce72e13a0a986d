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
from fewshot.score import Result, accuracy, score, summarise
from fewshot.task import draw_support

CPU = torch.device("cpu")
PROBES = tuple(probes.PROBES)


def scored(digits, ids=None, oracle=False, advance=lambda: None, **protocol):
    x, y, query_x, query_y = digits
    ids = np.arange(len(y)) if ids is None else ids
    section = ProtocolSection(**{"shots": (1, 5), "seeds": (0, 1), **protocol})
    draws = draw_support(y, classes=10, shots=section.shots, seeds=section.seeds, ids=ids)
    order = np.argsort(ids)
    features = FeatureSet(ids[order], x[order], query_x)
    return score(features, draws, query_y, 10, section, CPU, oracle, advance)


def test_every_probe_is_scored_on_every_draw(digits):
    results, sweeps = scored(digits)
    found = {(row.probe, row.shots, row.seed) for row in results}
    assert found == {(probe, shots, seed) for probe in PROBES for shots in (1, 5) for seed in (0, 1)}
    assert len(results) == len(found)
    assert sweeps == []


def test_lambda_stands_where_there_is_one(digits):
    results, _ = scored(digits, shots=(1,), seeds=(0,))
    assert {row.probe: row.l2 for row in results} == {
        "ridge": 1024.0, "logistic": 1.0, "knn10": None, "knn20": None, "nearest_mean": None,
    }  # fmt: skip


def test_permuting_rows_with_their_ids_changes_nothing(digits):
    x, y, query_x, query_y = digits
    shuffled = np.random.default_rng(3).permutation(len(y))
    mixed = (x[shuffled], y[shuffled], query_x, query_y)
    assert scored(mixed, ids=shuffled) == scored(digits)


def test_the_sweep_goes_through_the_headline(digits):
    results, sweeps = scored(digits, probes=("ridge",), oracle=True, shots=(5,), seeds=(0,))
    (row,), (curve,) = results, sweeps
    assert curve.l2 == SWEEP
    assert curve.accuracy[SWEEP.index(1024.0)] == row.accuracy
    assert len(set(curve.accuracy)) > 5
    _, again = scored(digits, probes=("knn10",), oracle=True, shots=(5,), seeds=(0,))
    assert again == [curve]


def test_accuracy_counts_every_query_once():
    labels = np.arange(3000) % 7
    query = np.stack([labels, labels], axis=1).astype(np.float32)
    query[::10] += 1
    assert accuracy(lambda x: x[:, 0].long(), query, labels, CPU) == pytest.approx(0.9)


@pytest.mark.parametrize(("smallest", "within"), [(10**9, 1), (0, 2)])
def test_small_problems_take_one_thread_and_give_the_others_back(digits, monkeypatch, smallest, within):
    monkeypatch.setattr("fewshot.score._SMALL", smallest)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        scored(digits, shots=(1,), seeds=(0,), advance=lambda: seen.append(torch.get_num_threads()))
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
    results, _ = scored(digits, probes=("ridge", "logistic"))
    assert {(row.probe, row.converged) for row in results} == {("ridge", True), ("logistic", False)}
    mixed = [replace(row, converged=row.seed == 0) for row in results if row.probe == "logistic"]
    assert {row.converged for row in summarise(mixed)} == {False}
    assert {row.converged for row in summarise(mixed[:1])} == {True}


def test_another_probe_is_one_entry_in_the_table(digits, monkeypatch):
    def fit(support, labels, classes, l2):
        return probes.Fitted(lambda features: torch.zeros(len(features), classes))

    monkeypatch.setitem(probes.PROBES, "first", probes.Probe("first", "always the first class", fit, l2=2.0))
    results, _ = scored(digits, probes=("first",), shots=(1,), seeds=(0,))
    expected = Result("", "first", "", 1, 0, 2.0, float((digits[3] == 0).mean()))
    assert results == [expected]
