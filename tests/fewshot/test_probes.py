"""The other probes, against scikit-learn and against loops."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from fewshot.probes.logistic import fit_logistic
from fewshot.probes.neighbours import fit_nearest_mean
from fewshot.probes.ridge import Scaling
from fewshot.probes.table import PROBES
from fewshot.task import draw_support


@pytest.fixture(params=[1, 10])
def task(digits, request):
    """(support [n, 64], labels, query, standardised support, standardised query) at 1 and 10 shots."""
    x, y, query, _ = digits
    (draw,) = draw_support(y, classes=10, shots=[request.param], seeds=[0])
    support, query = torch.from_numpy(x[draw.ids]), torch.from_numpy(query)
    scaling = Scaling.of(support)
    return support, torch.from_numpy(draw.labels), query, scaling(support).numpy(), scaling(query).numpy()


def test_logistic_is_scikit_learns_as_it_comes(task):
    support, labels, query, scaled, scaled_query = task
    reference = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(scaled, labels)
    found = fit_logistic(support, labels, 10, 1.0)(query)
    assert found.tolist() == reference.predict(scaled_query).tolist()


def test_logistic_trains_inside_no_grad(task):
    support, labels, query, *_ = task
    with torch.no_grad():
        within = fit_logistic(support, labels, 10, 1.0)(query)
    assert torch.equal(within, fit_logistic(support, labels, 10, 1.0)(query))


def test_logistic_says_when_it_has_not_converged(task, monkeypatch):
    support, labels, *_ = task
    assert fit_logistic(support, labels, 10, 1.0).converged
    assert not fit_logistic(support * math.nan, labels, 10, 1.0).converged
    monkeypatch.setattr("fewshot.probes.logistic.ITERATIONS", 2)
    assert not fit_logistic(support, labels, 10, 1.0).converged


@pytest.mark.parametrize("neighbours", [10, 20])
def test_neighbours_vote_by_their_cosine(task, neighbours):
    support, labels, query, *_ = task
    found = PROBES[f"knn{neighbours}"].fit(support, labels, 10, 0.0)(query[:100])
    known = support.double().numpy()
    for row, prediction in zip(query[:100].double().numpy(), found.tolist(), strict=True):
        cosine = known @ row / (np.linalg.norm(known, axis=1) * np.linalg.norm(row))
        votes = [0.0] * 10
        for place in np.argsort(-cosine)[:neighbours]:
            votes[labels[place]] += math.exp(cosine[place] / 0.07)
        assert prediction == int(np.argmax(votes))


@pytest.mark.filterwarnings("ignore")  # of statistics that the reference also takes
def test_the_nearest_mean_is_scikit_learns_centroid(task):
    support, labels, query, scaled, scaled_query = task
    reference = NearestCentroid().fit(scaled, labels)
    assert fit_nearest_mean(support, labels, 10, 0.0)(query).tolist() == reference.predict(scaled_query).tolist()


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_separates_what_is_separable(name):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(6)
    centres = 5 * torch.eye(4, 16)
    support, query = (centres[labels] + torch.empty(24, 16).normal_(0, 0.3, generator=generator) for _ in range(2))
    assert PROBES[name].fit(support, labels, 4, 1024.0)(query).tolist() == labels.tolist()
