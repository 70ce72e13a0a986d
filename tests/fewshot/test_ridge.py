"""The closed-form probe: protocol steps 4 to 8."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Reference

from fewshot.probes.decomposition import decompose
from fewshot.probes.ridge import SWEEP, fit_ridge
from fewshot.probes.support import Scaling, Support
from fewshot.task import draw_support

REGIMES = {"more rows than columns": (200, 24), "fewer rows than columns": (40, 90), "as many": (60, 59)}


@pytest.fixture(params=REGIMES.values(), ids=REGIMES)
def labelled(request):
    """(features [n, d] far from the origin, labels [n] of 5 classes)."""
    n, d = request.param
    generator = torch.Generator().manual_seed(n)
    x = torch.empty(n, d, dtype=torch.float64).normal_(3, 2, generator=generator)
    return x, torch.randint(5, (n,), generator=generator)


def targets(labels):
    return 2 * torch.nn.functional.one_hot(labels, 5).double() - 1


@pytest.mark.parametrize("columns", [320, 11])
@pytest.mark.parametrize("l2", [2.0**-10, 1.0, 2.0**10, 2.0**19])
def test_the_closed_form_solves_the_normal_equations(labelled, l2, columns, monkeypatch):
    monkeypatch.setattr("fewshot.probes.decomposition._COLUMNS", columns)
    x, labels = labelled
    direct = torch.linalg.solve(x.T @ x + l2 * torch.eye(x.shape[1]), x.T @ targets(labels))
    solved = decompose(x, labels, 5).weights(l2)
    assert (solved - direct).abs().max() < 1e-9 * max(1, direct.abs().max())


def test_weights_are_those_of_scikit_learn(labelled):
    x, labels = labelled
    # Not seen in the predictions: with as many images of each class the bias is the same for all.
    design = np.concatenate([Scaling.of(x)(x), np.full((len(x), 1), 100.0)], axis=1)
    reference = Reference(alpha=1024.0, fit_intercept=False, solver="cholesky").fit(design, targets(labels))
    found = Support(x, labels, 5).decomposition.weights(1024.0)
    assert np.allclose(found.T, reference.coef_, rtol=0, atol=1e-9)


def literally(support_x, support_y, query_x, l2):
    """Steps 4 to 8 as the protocol's page has them, in numpy."""
    mean, std = support_x.mean(axis=0), support_x.std(axis=0) + 1e-5
    x = np.concatenate([(support_x - mean) / std, np.full((len(support_x), 1), 100.0)], axis=1)
    y = 2 * np.eye(support_y.max() + 1)[support_y] - 1
    if x.shape[0] >= x.shape[1]:
        e, q = np.linalg.eigh(x.T @ x)
        lhs, rhs = q, q.T @ (x.T @ y)
    else:
        e, q = np.linalg.eigh(x @ x.T)
        lhs, rhs = x.T @ q, q.T @ y
    weights = lhs @ np.diag(1 / (e + l2)) @ rhs
    query = np.concatenate([(query_x - mean) / std, np.full((len(query_x), 1), 100.0)], axis=1)
    return (query @ weights).argmax(axis=1)


@pytest.mark.parametrize("shots", [1, 5, 25])
def test_predictions_are_those_of_the_protocol_word_for_word(digits, shots):
    x, y, query_x, _ = digits
    (draw,) = draw_support(y, classes=10, shots=[shots], seeds=[0])
    found = fit_ridge(Support(torch.from_numpy(x[draw.ids]), torch.from_numpy(draw.labels), 10), 1024.0)
    expected = literally(x[draw.ids].astype(np.float64), draw.labels, query_x.astype(np.float64), 1024.0)
    assert found(torch.from_numpy(query_x)).tolist() == expected.tolist()


def test_one_decomposition_serves_the_whole_sweep(labelled):
    x, labels = labelled
    solved = decompose(x, labels, 5)
    assert (SWEEP[0], SWEEP[-1], len(SWEEP)) == (2.0**-10, 2.0**19, 30)
    for l2 in SWEEP:
        weights = solved.weights(l2)
        left = x.T @ (x @ weights) + l2 * weights - x.T @ targets(labels)
        assert left.abs().max() < 1e-7


def test_the_probe_is_fp64_although_features_are_not(labelled):
    x, labels = labelled
    shifted = (x + 1e3).float()
    single, double = (
        Support(features, labels, 5).decomposition.weights(1.0) for features in (shifted, shifted.double())
    )
    assert torch.equal(single, double)


def test_a_feature_that_never_varies_does_no_harm(labelled):
    x, labels = labelled
    padded = torch.cat([x, x.new_full((len(x), 1), 7.0)], dim=1)
    plain, wide = (fit_ridge(Support(features, labels, 5), 1.0) for features in (x, padded))
    assert torch.equal(plain(x), wide(padded))


def test_scaling_is_by_the_population_deviation_of_the_support_set():
    scaling = Scaling.of(torch.tensor([[0.0], [2.0], [4.0]]))
    assert scaling.mean.tolist() == [2.0]
    assert scaling.std.item() == pytest.approx((8 / 3) ** 0.5 + 1e-5, abs=1e-12)
    assert scaling(torch.tensor([[12.0]])).item() == pytest.approx(10 / ((8 / 3) ** 0.5 + 1e-5))
