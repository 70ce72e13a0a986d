"""The few-shot score while training."""

import math

import numpy as np
import pytest
import torch

from fewshot.evaluator import FewshotEvaluator
from fewshot.features import extract
from fewshot.score import score
from fewshot.store import FeatureSet
from fewshot.task import open_task
from pretrain.errors import InputError
from pretrain.run.config import FewshotSection, ModelSection, OptimizerSection, RunConfig, TrainSection

SIZES = {"patch_size": 2, "layers": 2, "width": 32, "mlp": 64, "heads": 2, "image_size": 8, "channels": 1}


@pytest.fixture
def config(digit_shards):
    """config(**model): a run that is scored at 1 and 5 shots over two seeds every 50 steps."""

    def make(section=True, **model):
        support, query = digit_shards
        fewshot = FewshotSection(every=50, support=support, query=query, shots=(1, 5), seeds=(0, 1))
        return RunConfig(
            name="run",
            model=ModelSection(**SIZES, num_classes=10, **model),
            train=TrainSection(global_batch=8, steps=100),
            optimizer=OptimizerSection(lr=1e-3),
            fewshot=fewshot if section else None,
        )

    return make


@pytest.mark.parametrize(("layer", "size"), [("tanh", 48), ("cls", None)])
def test_the_score_is_the_protocols_on_the_representation(config, drawn, digit_shards, alone, layer, size):
    run = config(representation_size=size)
    model = drawn(run.model.spec())
    found = dict(FewshotEvaluator(run, alone).run(model, 50))

    task = open_task(*digit_shards, shots=(1, 5), seeds=(0, 1))
    sizes = {"layers": [layer], "image_size": 8, "channels": 1, "batch": 64, "workers": 1, "world": alone}
    support = extract(model, task.support, np.arange(task.support.samples), **sizes)[layer]
    query = extract(model, task.query, np.arange(task.query.samples), **sizes)[layer]
    features = FeatureSet(np.arange(len(support)), support, query)
    results, _ = score(
        features,
        task.draws,
        task.query_labels,
        classes=10,
        probe_names=["ridge"],
        l2=1024.0,
        device=torch.device("cpu"),
    )
    for shots in (1, 5):
        expected = np.mean([row.accuracy for row in results if row.shots == shots])
        assert found.pop(f"fewshot/{shots}shot_ridge") == pytest.approx(expected, abs=1e-12)
    assert found == {}


def test_it_says_how_often_it_is_to_be_asked(config, alone):
    assert FewshotEvaluator(config(), alone).every == 50


def test_all_is_done_when_run_returns(config, drawn, alone):
    calls = []
    model = drawn(config().model.spec())
    model.register_forward_hook(lambda *_: calls.append(1))
    FewshotEvaluator(config(), alone).run(model, 50)
    assert calls


def test_training_goes_on_as_before(config, drawn, alone):
    model = drawn(config(dropout=0.1).model.spec()).train()
    FewshotEvaluator(config(dropout=0.1), alone).run(model, 50)
    assert model.training
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    assert model.patch_embedding.weight.grad is not None


def test_a_diverged_network_scores_nan(config, drawn, alone):
    model = drawn(config().model.spec())
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    found = dict(FewshotEvaluator(config(), alone).run(model, 50))
    assert list(found) == ["fewshot/1shot_ridge", "fewshot/5shot_ridge"]
    assert all(math.isnan(value) for value in found.values())


def test_faults_are_found_before_training_and_named_as_the_run_has_them(config, alone):
    run = config()
    short = run.model_copy(update={"fewshot": run.fewshot.model_copy(update={"shots": (1000,)})})
    with pytest.raises(InputError, match=r"fewshot\.support .*: 1000 shots"):
        FewshotEvaluator(short, alone)


def test_a_run_without_the_section_is_refused(config, alone):
    with pytest.raises(InputError, match="no fewshot section"):
        FewshotEvaluator(config(section=False), alone)
