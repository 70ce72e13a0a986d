"""The few-shot score while training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fewshot.cache import FeatureCache, FeatureSet
from fewshot.config import DataSection as FewshotData
from fewshot.config import FewshotConfig, ProtocolSection
from fewshot.evaluator import FewshotEvaluator
from fewshot.features import LAYERS, Extraction, extract
from fewshot.report.report import report_networks
from fewshot.score import score, score_networks, summarise
from fewshot.task import open_task
from pretrain.datasets.dataset import Dataset, png
from pretrain.engine.section import OptimizerSection
from pretrain.errors import InputError, StorageError
from pretrain.index.index import Index
from pretrain.model.section import ModelSection
from pretrain.shards.write import write_shards
from pretrain.stream.section import DataSection
from pretrain.training.config import FewshotSection, RunConfig, TrainSection
from pretrain.weights.networks import open_networks

IMAGES = np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)
LABELS = np.arange(100) % 10
SIZES = {"patch_size": 2, "layers": 2, "width": 32, "mlp": 64, "heads": 2, "image_size": 8, "channels": 1}


@pytest.fixture
def config(digit_shards):
    """config(support=…, query=…, data=…, **model): a run, scored at 1 and 5 shots over two seeds every 50 steps."""

    def make(section=True, support=digit_shards[0], query=digit_shards[1], data=None, **model):
        fewshot = FewshotSection(every=50, support=support, query=query, shots=(1, 5), seeds=(0, 1))
        return RunConfig(
            name="run",
            model=ModelSection(**SIZES, num_classes=10, **model),
            data=data or DataSection(),
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

    protocol = ProtocolSection(shots=(1, 5), seeds=(0, 1), probes=("ridge",))
    task, how = open_task(*digit_shards, protocol), Extraction(model.spec, 64, 1, alone)
    support, query = (
        extract(model, [LAYERS[layer]], index, np.arange(index.samples), how)[layer]
        for index in (task.support, task.query)
    )
    features = FeatureSet(np.arange(len(support)), support, query)
    results = score(features, task.draws, task.query_labels, 10, protocol, torch.device("cpu")).results
    for shots in (1, 5):
        expected = np.mean([row.accuracy for row in results if row.shots == shots])
        assert found.pop(f"fewshot/{shots}shot_ridge") == pytest.approx(expected, abs=1e-12)
    assert found == {}
    assert FewshotEvaluator(run, alone).scores == ("fewshot/1shot_ridge", "fewshot/5shot_ridge")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_score_of_a_run_is_that_of_its_checkpoint_in_the_same_arithmetic(
    config, drawn, alone, digit_shards, run_folder, tmp_path, dtype
):
    run = config(representation_size=48)
    model = drawn(run.model.spec())
    path = run_folder(tmp_path / "run", model)  # as saved: in fp32
    logged = dict(FewshotEvaluator(run, alone).run(model.to(getattr(torch, dtype)), 50))

    protocol = ProtocolSection(
        shots=(1, 5), seeds=(0, 1), features=("tanh",), probes=("ridge",), oracle=False, dtype=dtype
    )
    task = open_task(*digit_shards, protocol)
    after = FewshotConfig(name="after", data=FewshotData(workers=1), fewshot=protocol)
    (network,) = open_networks([path], None, dtype=getattr(torch, dtype))
    features = [FeatureCache(after, task.splits, tmp_path, alone).features(network)]
    scores = score_networks(features, task, protocol, torch.device("cpu"))
    ending = "" if dtype == "float32" else "_bfloat16"
    assert logged == {f"fewshot/{row.shots}shot_ridge{ending}": row.mean for row in summarise(scores.results)}
    report = report_networks(after, features, task, scores, "cpu", {})
    assert report["weights"][0]["dtype"] == dtype
    assert dtype in report["protocol"]["arithmetic"]


def test_query_images_without_a_label_are_not_scored(config, drawn, alone, tmp_path):
    labels = np.concatenate([np.arange(80) % 10]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(np.arange(100) % 5 != 2)])
    data = Dataset("gaps", "all", labels, starts, None, "x", lambda row: ("png", png(IMAGES[row])))
    evaluator = FewshotEvaluator(config(query=str(write_shards(data, tmp_path)[0])), alone)
    found = dict(evaluator.run(drawn(config().model.spec()), 50))
    assert found["fewshot/unlabelled"] == 20
    assert found["fewshot/5shot_ridge"] * 80 * 2 == pytest.approx(round(found["fewshot/5shot_ridge"] * 80 * 2))


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


def test_indices_are_checked_as_those_of_training_are(config, alone, digit_shards):
    support, query = digit_shards
    with pytest.raises(InputError, match=r"fewshot\.query: .* holds the samples of .* would be scored"):
        FewshotEvaluator(config(query=(query, support)), alone)
    with pytest.raises(InputError, match=r"fewshot\.support: .* holds the samples of .* again; index each shard once"):
        FewshotEvaluator(config(support=(support, support)), alone)


def test_a_query_set_that_is_trained_on_is_told(config, alone, digit_shards, capsys):
    support, query = digit_shards
    FewshotEvaluator(config(data=DataSection(train=support)), alone)
    assert capsys.readouterr().out == ""
    FewshotEvaluator(config(data=DataSection(train=(support, query))), alone)
    told = "note: fewshot.query: 150 of 150 images are in data.train too (shard "
    assert capsys.readouterr().out.startswith(told)


def test_a_shard_that_is_not_there_is_found_before_training(config, shards, alone):
    query = shards("gone", IMAGES, LABELS)
    (shard,) = Index.open(query).shards.urls()
    Path(shard).unlink()
    with pytest.raises(InputError, match=shard):
        FewshotEvaluator(config(query=query), alone)


def test_a_damaged_index_is_found_before_training(config, shards, alone):
    support = shards("flipped", IMAGES, LABELS)
    index = Index.open(support)
    (file,), labels = index.files, index.labels(np.arange(100)).astype("<i4")
    data = bytearray(file.path.read_bytes())
    data[data.index(labels.tobytes())] ^= 1
    file.path.write_bytes(data)
    with pytest.raises(InputError, match="damaged: its arrays hash to"):
        FewshotEvaluator(config(support=support), alone)


def test_images_that_do_not_decode_are_counted_and_told(config, shards, damage, drawn, alone, capsys):
    support, query = shards("support", IMAGES, LABELS), shards("query", 255 - IMAGES, LABELS)
    evaluator = FewshotEvaluator(config(support=support, query=query), alone)
    model = drawn(config().model.spec())
    assert "fewshot/unreadable" not in dict(evaluator.run(model, 50))
    taken = int(evaluator._task.support_ids[3])
    for path, id in ((support, taken), (query, 7), (query, 9)):
        damage(path, id)
    capsys.readouterr()
    found = dict(evaluator.run(model, 50))
    assert list(found) == ["fewshot/1shot_ridge", "fewshot/5shot_ridge", "fewshot/unreadable"]
    assert found["fewshot/unreadable"] == 3
    said = capsys.readouterr().out
    assert f"fewshot.support: 1 of {len(evaluator._task.support_ids)} images cannot be read and are seen as" in said
    assert "fewshot.query: 2 of 100 images" in said
    assert f": sample {taken} (" in said
    assert ": sample 7 (" in said


def test_storage_that_does_not_answer_is_waited_for_as_the_config_says(config, digit_shards, remote, drawn, alone):
    server, query = remote(digit_shards[1])
    run = config(query=query, data=DataSection(patience_minutes=0.01))
    evaluator = FewshotEvaluator(run, alone)
    server.usual = 503
    with pytest.raises(StorageError, match=r"^fewshot\.query: .*503 Service Unavailable; given up after"):
        evaluator.run(drawn(run.model.spec()), 50)
    with pytest.raises(StorageError, match="503 Service Unavailable; given up after"):
        FewshotEvaluator(run, alone)


def test_a_run_without_the_section_is_refused(config, alone):
    with pytest.raises(InputError, match="no fewshot section"):
        FewshotEvaluator(config(section=False), alone)
