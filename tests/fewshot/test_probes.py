"""The other probes, against scikit-learn and against loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from fewshot.probes.logistic import fit_logistic
from fewshot.probes.neighbours import fit_nearest_mean
from fewshot.probes.sgd import LR, MOMENTUM, SEED, STEPS, _batches, fit_sgd
from fewshot.probes.support import Support
from fewshot.probes.table import PROBES
from fewshot.task import draw_support


@pytest.fixture(params=[1, 10])
def task(digits, request):
    """(support set of n rows of 64, query, standardised support, standardised query) at 1 and 10 shots."""
    x, y, query, _ = digits
    (draw,) = draw_support(y, classes=10, shots=[request.param], seeds=[0])
    support, query = Support(torch.from_numpy(x[draw.ids]), torch.from_numpy(draw.labels), 10), torch.from_numpy(query)
    return support, query, support.scaled.numpy(), support.scaling(query).numpy()


def test_logistic_is_scikit_learns_as_it_comes(task):
    support, query, scaled, scaled_query = task
    reference = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(scaled, support.labels)
    found = fit_logistic(support, 1.0)(query)
    assert found.tolist() == reference.predict(scaled_query).tolist()


def test_logistic_trains_inside_no_grad(task):
    support, query, *_ = task
    with torch.no_grad():
        within = fit_logistic(support, 1.0)(query)
    assert torch.equal(within, fit_logistic(support, 1.0)(query))


def test_logistic_says_when_it_has_not_converged(task, monkeypatch):
    support, *_ = task
    assert fit_logistic(support, 1.0).converged
    assert not fit_logistic(replace(support, features=support.features * math.nan), 1.0).converged
    monkeypatch.setattr("fewshot.probes.logistic.ITERATIONS", 2)
    assert not fit_logistic(support, 1.0).converged


@pytest.mark.parametrize("neighbours", [10, 20])
def test_neighbours_vote_by_their_cosine(task, neighbours):
    support, query, *_ = task
    found = PROBES[f"knn{neighbours}"].fit(support, 0.0)(query[:100])
    known = support.features.double().numpy()
    for row, prediction in zip(query[:100].double().numpy(), found.tolist(), strict=True):
        cosine = known @ row / (np.linalg.norm(known, axis=1) * np.linalg.norm(row))
        votes = [0.0] * 10
        for place in np.argsort(-cosine)[:neighbours]:
            votes[support.labels[place]] += math.exp(cosine[place] / 0.07)
        assert prediction == int(np.argmax(votes))


@pytest.mark.filterwarnings("ignore")  # of statistics that the reference also takes
def test_the_nearest_mean_is_scikit_learns_centroid(task):
    support, query, scaled, scaled_query = task
    reference = NearestCentroid().fit(scaled, support.labels)
    assert fit_nearest_mean(support, 0.0)(query).tolist() == reference.predict(scaled_query).tolist()


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_separates_what_is_separable(name):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(6)
    centres = 5 * torch.eye(4, 16)
    support, query = (centres[labels] + torch.empty(24, 16).normal_(0, 0.3, generator=generator) for _ in range(2))
    fitted = PROBES[name].fit(Support(support, labels, 4), 1024.0)
    assert fitted(query).tolist() == labels.tolist()
    assert (fitted.linear is not None) == PROBES[name].linear


def test_sgd_follows_its_recipe_step_by_step(task):
    """As torch's own optimizer and schedule take it."""
    support, query, *_ = task
    x, n, d = support.scaled, *support.scaled.shape
    layer = torch.nn.Linear(d, 10, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR * 10**0.5 / d, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = np.random.default_rng(SEED)
    rows = np.concatenate([generator.permutation(n) for _ in range(STEPS)])  # batches here are of all n
    for batch in rows.reshape(STEPS, n):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x[batch]), support.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    expected = layer(support.scaling(query)).detach()
    assert torch.allclose(
        fit_sgd(support, 0.0).scores(query), expected, rtol=0, atol=1e-9 * float(expected.abs().max())
    )


def test_sgd_takes_every_image_equally_often(monkeypatch):
    """Permutations follow one another, and batches may begin in one and end in the next."""
    monkeypatch.setattr("fewshot.probes.sgd.STEPS", 30)
    batches = _batches(10, 4, torch.device("cpu"))
    assert {len(batch) for batch in batches} == {4}
    assert torch.cat(batches).bincount().tolist() == [12] * 10


@pytest.mark.parametrize(("width", "shots"), [(24, 1), (24, 25), (1280, 1), (1280, 5)])
def test_sgd_learns_its_support_set_at_any_width(digits, width, shots):
    x, y, *_ = digits
    (draw,) = draw_support(y, classes=10, shots=[shots], seeds=[0])
    mix = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    support = Support(torch.from_numpy(x[draw.ids] @ mix), torch.from_numpy(draw.labels), 10)
    right = (fit_sgd(support, 0.0)(support.features) == support.labels).double().mean()
    assert right > 0.98
