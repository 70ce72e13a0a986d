"""launch/finetune.py: a checkpoint becomes a task, at another resolution, through its command."""

import json
from pathlib import Path

import pytest
import torch

from finetune.head import transfer
from pretrain.model.vit import VisionTransformer, load_tensors
from pretrain.weights.export import export
from pretrain.weights.load import choose, load_weights
from pretrain.weights.read import FORMATS
from tests.conftest import history

PRETRAIN = {
    "name": "before",
    "model": {
        "patch_size": 4, "layers": 2, "width": 48, "mlp": 96, "heads": 3,
        "image_size": 16, "channels": 1, "num_classes": 10, "representation_size": 32,
    },
    "train": {"global_batch": 32, "steps": 20},
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_steps": 2},
    "logging": {"tensorboard": False, "peak_tflops": 0.1},
}  # fmt: skip
FINETUNE = {
    "name": "after",
    "model": {"image_size": 24, "num_classes": 10},
    "train": {"global_batch": 32, "steps": 60},
    "optimizer": {"name": "sgd", "lr": 0.03},
    "schedule": {"warmup_steps": 5, "decay": "cosine"},
    "logging": {"every": 1, "tensorboard": False, "peak_tflops": 0.1},
}


@pytest.fixture(scope="module")
def home(digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    data = {"train": str(digits / "train"), "eval": str(digits / "test"), "workers": 1, "flip": False}
    (folder / "before.json").write_text(json.dumps({**PRETRAIN, "data": data}))
    fewshot = {"every": 30, "support": data["train"], "query": data["eval"]}
    after = {**FINETUNE, "data": {**data, "crop_area": [0.7, 1.0]}, "fewshot": fewshot}
    (folder / "after.json").write_text(json.dumps(after))
    return folder


@pytest.fixture(scope="module")
def pretrained(home, run) -> Path:
    done = run("launch/pretrain.py", "--config", home / "before.json", "--out", home / "before")
    assert done.returncode == 0, done.stderr
    return home / "before"


def test_weights_are_read_whole_from_a_run_and_from_its_checkpoint(pretrained):
    from_run, from_checkpoint = load_weights(pretrained), load_weights(pretrained / "checkpoints" / "step_00000020")
    assert from_run.sha256 == from_checkpoint.sha256
    assert (from_run.step, from_run.spec.representation_size) == (20, 32)
    assert all(tensor.dtype is torch.float32 for tensor in from_run.tensors.values())


def test_a_transferred_network_starts_from_the_same_features_and_zero_logits(pretrained):
    weights = load_weights(pretrained)
    before = VisionTransformer(weights.spec).eval()
    load_tensors(before, weights.tensors)
    spec, tensors = transfer(weights.spec, weights.tensors, num_classes=10, image_size=16)
    after = VisionTransformer(spec).eval()
    load_tensors(after, tensors)
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(after(images, features=True)["cls"], before(images, features=True)["cls"])
        assert torch.equal(after(images), torch.zeros(3, 10))


def test_it_fine_tunes_at_a_higher_resolution_and_goes_on_where_it_was(home, pretrained, run):
    words = ("launch/finetune.py", "--config", home / "after.json", "--init", pretrained, "--out", home / "after")
    done = run(*words, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dropped: representation layer (32) and head of 10 classes" in done.stdout
    assert "4x4 → 6x6 (16 → 24 px)" in done.stdout
    lines = [json.loads(line) for line in (home / "after" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(2.302585, abs=1e-5), "a zero head gives every class the same chance"
    assert lines[-1]["eval/top1"] > 0.3, "chance is 0.1"
    assert [line["step"] for line in lines if line.get("fewshot/5shot_ridge", 0) > 0.3] == [30, 60]
    weights = load_weights(home / "after")
    assert (weights.spec.image_size, weights.spec.representation_size) == (24, None)

    again = run(*words, ranks=2)
    assert (again.returncode, "finished at step 60" in again.stdout) == (0, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.layers=3"], ("model.layers", "unknown key")),
        (["model.image_size=2"], ("model.image_size",)),
        (["model.num_classes=5"], ("data.train", "model.num_classes=10")),
    ],
)
def test_what_does_not_fit_is_refused(changes, words, home, pretrained, run, tmp_path):
    command = ("launch/finetune.py", "--config", home / "after.json", "--init", pretrained, "--out", tmp_path)
    done = run(*command, *changes)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr


@pytest.fixture(scope="module")
def exports(pretrained) -> dict[str, Path]:
    """The pre-trained network in files: whole, and its body alone."""
    whole, body = pretrained / "whole.safetensors", pretrained / "body.safetensors"
    export(choose(pretrained), FORMATS["safetensors"], whole)
    export(choose(pretrained), FORMATS["timm"], body, drop=["representation", "head"])
    return {"whole": whole, "body": body}


def test_a_file_of_weights_fine_tunes_to_the_losses_of_the_run_that_it_came_from(home, pretrained, exports, run):
    for name, init in (("run", pretrained), ("file", exports["body"])):
        out = home / f"from_{name}"
        done = run("launch/finetune.py", "--config", home / "after.json", "--init", init, "--out", out, "train.steps=3")
        assert done.returncode == 0, done.stderr
    assert "dropped: nothing; new: head of 10, zeros" in done.stdout
    assert history(home / "from_run").losses == history(home / "from_file").losses
    again = run("launch/finetune.py", "--config", home / "after.json", "--init", exports["whole"], "--out", out)
    assert again.returncode == 2
    assert f"began from weights of {exports['body']} (step 20, sha256" in again.stderr


def test_pre_training_starts_from_a_file_of_the_same_network_alone(home, exports, run):
    words = ("launch/pretrain.py", "--config", home / "before.json", "--out", home / "again")
    refused = run(*words, "--init", exports["body"], "train.steps=2")
    assert refused.returncode == 2
    assert "representation_size is None, the config's 32" in refused.stderr
    done = run(*words, "--init", exports["whole"], "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert f"from weights of {exports['whole']} (step 20" in done.stdout


def test_few_shot_scores_of_a_file_are_those_of_the_run(home, digits, pretrained, exports, run):
    protocol = {
        "name": "probe",
        "data": {"support": str(digits / "train"), "query": str(digits / "test"), "workers": 1},
    }
    protocol["fewshot"] = {"shots": [5], "seeds": [0], "probes": ["ridge"], "features": ["cls"], "oracle": False}
    (home / "probe.json").write_text(json.dumps(protocol))
    init = ("--init", pretrained, "--init", exports["body"])
    done = run("launch/fewshot.py", "--config", home / "probe.json", *init, "--out", home / "probe")
    assert done.returncode == 0, done.stderr
    report = json.loads((home / "probe/report/report.json").read_text())
    assert [one["id"] for one in report["weights"]] == ["before", "body.safetensors"]
    first, second = (row["accuracy"] for row in report["results"])
    assert first == second


def test_weights_that_are_not_there_are_named(home, run, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in ("nowhere", "empty"):
        done = run("launch/finetune.py", "--config", home / "after.json", "--init", tmp_path / place)
        assert done.returncode == 2
        assert str(tmp_path / place) in done.stderr
