"""λ chosen on the support set: each image left out of the solution in turn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV

from fewshot.probes.decomposition import decompose
from fewshot.probes.ridge import SWEEP, fit_ridge, fit_ridge_held_out
from fewshot.probes.support import Support
from fewshot.task import draw_support

REGIMES = {"more rows than columns": (90, 24), "fewer rows than columns": (40, 90), "as many": (30, 30)}


@pytest.fixture(params=REGIMES.values(), ids=REGIMES)
def labelled(request):
    """(X [n, d] of 4 overlapping classes, labels [n])."""
    n, d = request.param
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) % 4
    x = torch.empty(n, d, dtype=torch.float64).normal_(1, 2, generator=generator)
    return x + 2 * torch.eye(4, d, dtype=torch.float64)[labels], labels


def targets(labels, classes):
    return 2 * torch.nn.functional.one_hot(labels, classes).double() - 1


def solved_again(x, labels, classes, l2):
    """[n, k]: what a solution of all other rows, each made anew, predicts of a row."""
    found = []
    for row in range(len(x)):
        others = torch.arange(len(x)) != row
        kept, y = x[others], targets(labels[others], classes)
        weights = torch.linalg.solve(kept.T @ kept + l2 * torch.eye(x.shape[1]), kept.T @ y)
        found.append(x[row] @ weights)
    return torch.stack(found)


@pytest.mark.parametrize("rows", [1024, 7])
def test_what_is_left_out_is_predicted_as_by_a_solution_without_it(labelled, rows, monkeypatch):
    monkeypatch.setattr("fewshot.probes.decomposition._ROWS", rows)
    x, labels = labelled
    l2 = (2.0**-3, 1.0, 2.0**5, 2.0**19)
    right, errors = decompose(x, labels, 4).leave_one_out(x, labels, l2)
    for at, strength in enumerate(l2):
        predicted = solved_again(x, labels, 4, strength)
        assert right[at] == (predicted.argmax(dim=1) == labels).sum()
        assert float(errors[at]) == pytest.approx(float((targets(labels, 4) - predicted).square().sum()), rel=1e-9)


def test_squared_errors_are_those_of_scikit_learns_leave_one_out(labelled):
    x, labels = labelled
    y = targets(labels, 4)
    reference = RidgeCV(alphas=SWEEP, fit_intercept=False, store_cv_results=True).fit(x.numpy(), y.numpy())
    _, errors = decompose(x, labels, 4).leave_one_out(x, labels, SWEEP)
    # [n, k, λ]; at the smallest λ scikit-learn's own sums lose digits.
    assert np.allclose(errors, reference.cv_results_.sum(axis=(0, 1)), rtol=1e-5, atol=0)


def support_of(digits, shots, seed=0):
    x, y, *_ = digits
    (draw,) = draw_support(y, classes=10, shots=[shots], seeds=[seed])
    return Support(torch.from_numpy(x[draw.ids]), torch.from_numpy(draw.labels), 10)


@pytest.mark.parametrize("shots", [2, 10])
def test_the_chosen_lambda_predicts_most_of_the_images_left_out(digits, shots):
    support = support_of(digits, shots)
    fitted = fit_ridge_held_out(support, 1024.0)
    standings = []
    for l2 in SWEEP:
        predicted = solved_again(support.design, support.labels, 10, l2)
        error = (targets(support.labels, 10) - predicted).square().sum()
        standings.append((int((predicted.argmax(dim=1) == support.labels).sum()), -float(error), l2))
    assert fitted.l2 == max(standings)[-1] != 1024.0
    query = torch.from_numpy(digits[2])
    assert torch.equal(fitted.scores(query), fit_ridge(support, fitted.l2).scores(query))


def test_of_equal_lambdas_the_largest_is_chosen(digits, monkeypatch):
    support = support_of(digits, 2)
    equal = torch.full((30,), 7), torch.ones(30)
    monkeypatch.setattr("fewshot.probes.decomposition.Decomposition.leave_one_out", lambda *_: equal)
    assert fit_ridge_held_out(support, 1024.0).l2 == SWEEP[-1]


def test_a_single_image_of_a_class_leaves_lambda_as_configured(digits):
    assert fit_ridge_held_out(support_of(digits, 1), 64.0).l2 == 64.0


def test_a_support_set_is_decomposed_once_for_all_that_solve_it(digits, monkeypatch):
    eigh, calls = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda x, **options: calls.append(x) or eigh(x, **options))
    support = support_of(digits, 5)
    fitted = fit_ridge(support, 1024.0)
    for l2 in SWEEP:
        fitted.with_l2(l2)
    fit_ridge_held_out(support, 1024.0)
    assert len(calls) == 1
