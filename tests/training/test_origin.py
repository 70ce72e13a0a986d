"""Where a run comes from is part of what it is: it is kept, a resume needs it no more, and another one is refused."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.step import Checkpoint
from pretrain.datasets.dataset import png
from pretrain.datasets.sources import open_source
from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.shards.scan import index_shards
from pretrain.shards.write import write_shards
from pretrain.training.origin import Init, check_origin
from pretrain.weights.load import find, load_weights

PRETRAIN, FINETUNE = "launch/pretrain.py", "launch/finetune.py"
BEFORE = {
    "name": "before",
    "model": {
        "patch_size": 4, "layers": 1, "width": 16, "mlp": 32, "heads": 2,
        "image_size": 8, "channels": 1, "num_classes": 10, "representation_size": 8,
    },
    "train": {"global_batch": 16, "steps": 4},
    "optimizer": {"lr": 1e-2},
    "schedule": {"warmup_steps": 0},
    "checkpoint": {"every": 2, "keep": 9},
    "logging": {"tensorboard": False, "peak_tflops": 1},
}  # fmt: skip
AFTER = {
    "name": "after",
    "model": {"num_classes": 10},
    "train": {"global_batch": 16, "steps": 3},
    "optimizer": {"name": "sgd", "lr": 0.03},
    "schedule": {"warmup_steps": 1, "decay": "cosine"},
    "logging": {"tensorboard": False, "peak_tflops": 1},
}
OPTIMIZER = "optimizer.00000.safetensors"


@pytest.fixture(scope="module")
def told(digits, ranks, tmp_path_factory) -> SimpleNamespace:
    """What the commands of this module said, one after the other, in a folder of runs."""
    folder = tmp_path_factory.mktemp("origin")
    for name, config in (("before", BEFORE), ("after", AFTER)):
        data = {"train": str(digits / "train"), "workers": 1}
        (folder / f"{name}.json").write_text(json.dumps({**config, "data": data}))
    commands = []

    def give(name, script, out, *words, **first):
        config = ["--config", str(folder / ("before.json" if script == PRETRAIN else "after.json"))]
        words = [str(folder / word) if re.match(r"\w*/|runs", word) else word for word in words]
        if "--config" in words:
            config = []
        first = {key: [str(folder / v) for v in value] if key == "move" else str(folder / value)
                 for key, value in first.items()}  # fmt: skip
        commands.append({"name": name, "words": [script, *config, "--out", str(folder / out), *words], **first})

    steps = "runs_a/checkpoints/step_00000004", "runs_a/checkpoints/step_00000002"
    averaging = 'optimizer.averaging={"decay":0.5}'
    give("a", PRETRAIN, "runs_a", averaging)
    give("a, average left out", PRETRAIN, "runs_a")
    give("a, average ended", PRETRAIN, "runs_a", "optimizer.averaging=null")
    give("b", PRETRAIN, "runs_b", "seed=1")
    give("seed, with weights", PRETRAIN, "runs_b", "seed=1", "--init", "runs_a")
    give("nothing to begin from", FINETUNE, "runs_none")
    give("no such weights", FINETUNE, "runs_none", "--init", "runs_nowhere")
    give("weights of nothing", PRETRAIN, "runs_none", "--weights", "averaged")
    give("halfway", FINETUNE, "runs_f", "--init", "runs_a", stop="runs_f")
    others = {
        "another run": ["runs_b"],
        "another step": [steps[1]],
        "the average": ["runs_a", "--weights", "averaged"],
        "nowhere": ["runs_nowhere"],
    }
    for name, words in others.items():
        give(f"halfway, {name}", FINETUNE, "runs_f", "--init", *words)
    give("gone", FINETUNE, "runs_f", "--init", "runs_a", stop="runs_f", move=["runs_a", "runs_moved"])
    give("gone, the average", FINETUNE, "runs_f", "--init", "runs_a", "--weights", "averaged")
    give("without", FINETUNE, "runs_f")
    give("moved", FINETUNE, "runs_f", "--init", "runs_moved")
    give("back", FINETUNE, "runs_f", "--init", "runs_a", move=["runs_moved", "runs_a"])
    for name, words in others.items():
        give(f"finished, {name}", FINETUNE, "runs_f", "--init", *words)
    give("its own config", FINETUNE, "runs_g", "--config", "runs_f/config.json", "--init", steps[0])
    give("its own config, pretrained", PRETRAIN, "runs_h", "--config", "runs_b/config.json")
    give("from weights", PRETRAIN, "runs_p", "--init", "runs_a", "--weights", "averaged", stop="runs_p")
    give("from weights, again", PRETRAIN, "runs_p")
    give("from weights, raw", PRETRAIN, "runs_p", "--init", "runs_a")
    give("damaged", FINETUNE, "runs_d", "--init", "runs_a", stop="runs_d", damage=f"{steps[0]}/{OPTIMIZER}")
    give("damaged, again", FINETUNE, "runs_d", "--init", "runs_a")
    give("damaged, by name", FINETUNE, "runs_e", "--init", steps[0])
    give("moved on", PRETRAIN, "runs_b", "seed=1", "--extend", "train.steps=6")
    give("from b", FINETUNE, "runs_k", "--init", "runs_b/checkpoints/step_00000004")
    give("from b, moved on", FINETUNE, "runs_k", "--init", "runs_b")
    other = f"data.train={inverted(folder / 'inverted')}"
    blind = f"data.train={index_shards([digits / 'train'], folder / 'headers.vfi', content=False, workers=1)}"
    give("other pixels", PRETRAIN, "runs_h", "seed=1", other)
    give("on unknown pixels", PRETRAIN, "runs_u", blind, stop="runs_u")
    give("on unknown pixels, now known", PRETRAIN, "runs_u")
    give("on known pixels, now unknown", PRETRAIN, "runs_u", blind)
    ranks(1, Path(__file__).with_name("origins.py"), json.dumps(commands), folder / "told.json")
    told = json.loads((folder / "told.json").read_text())
    return SimpleNamespace(folder=folder, **{key: {name: one[key] for name, one in told.items()} for key in told["a"]})


def inverted(folder: Path) -> Path:
    """The digits with other pixels under the same keys, labels and sizes."""
    digits = open_source("digits", "train", None)

    def read(row: int) -> tuple[str, bytes]:
        return "png", png(255 - np.asarray(Image.open(io.BytesIO(digits.read(row)[1]))))

    write_shards(replace(digits, read=read), folder)
    return folder


def record(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def newest(run: Path) -> dict:
    saved, _ = checkpoints.newest(run / "checkpoints")
    return saved.state


def test_the_start_is_kept_from_checkpoint_to_checkpoint_and_in_the_config(told):
    began = Checkpoint.read(told.folder / "runs_a/checkpoints/step_00000002")
    origin = newest(told.folder / "runs_f")["origin"]
    assert origin["source"] == str(told.folder / "runs_a/checkpoints/step_00000004")
    assert (origin["step"], origin["weights"]) == (4, "raw")
    assert origin["model"]["representation_size"] == 8
    assert record(told.folder / "runs_f")["origin"] == origin
    assert newest(told.folder / "runs_b")["origin"] == record(told.folder / "runs_b")["origin"] == {"seed": 1}
    averaged = newest(told.folder / "runs_p")["origin"]
    assert (averaged["sha256"], averaged["weights"]) == (origin["sha256"], "averaged")
    assert newest(told.folder / "runs_d")["origin"]["sha256"] == began.sha256


@pytest.mark.parametrize("when", ["halfway", "finished"])
@pytest.mark.parametrize(
    ("which", "found"),
    [
        ("another run", r"names weights of \S*runs_b/checkpoints/step_00000004 \(step 4, sha256 \w{12}…\)"),
        ("another step", r"names weights of \S*runs_a/checkpoints/step_00000002 \(step 2, "),
        ("the average", r"names averaged weights of \S*runs_a/checkpoints/step_00000004 \(step 4, "),
        ("nowhere", r"runs_nowhere: no such file or folder"),
    ],
)
def test_another_start_is_refused_by_name(told, when, which, found):
    name = f"{when}, {which}"
    assert told.status[name] == 2, told.said[name]
    assert re.search(found, told.error[name])
    began = rf"began from weights of {told.folder}/runs_a/checkpoints/step_00000004 \(step 4, .*; leave --init out"
    assert re.search(began, told.error[name])


def test_a_resume_needs_no_weights_and_takes_the_same_ones_wherever_they_are(told):
    assert told.status["halfway"] == told.status["gone"] == 75
    assert "runs_a: no such file or folder" in told.said["gone"]
    assert "not needed to resume" in told.said["gone"]
    assert told.status["gone, the average"] == 2
    assert told.status["without"] == 0
    assert "resumed from" in told.said["without"]
    assert f"began from weights of {told.folder}/runs_a/checkpoints/step_00000004 (step 4" in told.said["without"]
    for name in ("moved", "back"):
        assert told.status[name] == 0
        assert "finished at step 3" in told.said[name]
        assert "note" not in told.said[name]


def test_other_pixels_under_the_same_keys_are_refused_and_unknown_ones_said(told):
    assert told.status["other pixels"] == 2
    assert "index_hash was '" in told.error["other pixels"]
    assert told.status["on unknown pixels"] == 75
    assert (
        "note: content of the shards: unknown of 1 shards; not all of it is in the hash"
        in told.said["on unknown pixels"]
    )
    assert told.status["on unknown pixels, now known"] == 0
    assert "note: the run recorded no content of its shards" in told.said["on unknown pixels, now known"]
    assert told.status["on known pixels, now unknown"] == 2
    assert "(this index does not hold all shards' sha256: index" in told.error["on known pixels, now unknown"]


def test_a_run_that_cannot_begin_without_weights_says_so(told):
    assert told.status["nothing to begin from"] == told.status["weights of nothing"] == 2
    assert "runs_none holds no checkpoint to resume; give --init WEIGHTS" in told.error["nothing to begin from"]
    assert "--weights averaged: goes with --init" in told.error["weights of nothing"]
    assert told.status["no such weights"] == 2
    assert not (told.folder / "runs_none").exists()


def test_weights_for_a_run_that_began_without_are_refused(told):
    assert told.status["seed, with weights"] == 2
    assert "began from seed 1; leave --init out" in told.error["seed, with weights"]


def test_pretraining_from_weights_resumes_without_them_and_refuses_others(told):
    assert told.status["from weights"] == 75
    assert told.status["from weights, again"] == 0
    assert told.status["from weights, raw"] == 2
    assert "began from averaged weights of" in told.error["from weights, raw"]


def test_a_runs_own_config_gives_the_same_run(told):
    for name, first, again in (("its own config", "f", "g"), ("its own config, pretrained", "b", "h")):
        assert told.status[name] == 0, told.error[name]
        runs = [told.folder / f"runs_{run}/checkpoints" for run in (first, again)]
        step = "step_00000003" if first == "f" else "step_00000004"
        assert load_weights(runs[0] / step).sha256 == load_weights(runs[1] / step).sha256


def test_an_average_ends_by_word_and_not_by_being_left_out(told):
    assert told.status["a, average left out"] == 2
    assert 'optimizer.averaging was {"decay": 0.5' in told.error["a, average left out"]
    assert "optimizer.averaging=null ends it" in told.error["a, average left out"]
    assert told.status["a, average ended"] == 0


def test_a_damaged_newest_checkpoint_is_passed_over_as_in_a_resume(told):
    assert told.status["damaged"] == 75
    assert f"step_00000004: damaged: {OPTIMIZER} has sha256" in told.said["damaged"]
    assert f"from weights of {told.folder}/runs_a/checkpoints/step_00000002 (step 2" in told.said["damaged"]
    assert told.status["damaged, again"] == 0, "the same command resumes"
    assert told.status["damaged, by name"] == 2
    assert f"step_00000004: damaged: {OPTIMIZER} has sha256" in told.error["damaged, by name"]


def test_weights_that_have_been_trained_further_are_others(told):
    assert told.status["moved on"] == told.status["from b"] == 0
    assert told.status["from b, moved on"] == 2
    assert "step_00000006 (step 6, " in told.error["from b, moved on"]
    assert "step_00000004 (step 4, " in told.error["from b, moved on"]


def test_a_start_that_is_gone_is_told_by_its_path_however_that_is_typed(tmp_path, run_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = VisionTransformer(ViTSpec(**BEFORE["model"]))
    path = run_folder(tmp_path / "a", model).relative_to(tmp_path)
    origin = Init(path).origin(find(path))
    assert origin["source"] == str(tmp_path / "a/checkpoints/step_00000003")
    shutil.rmtree(path)
    typed_then = {**origin, "source": "a/checkpoints/step_00000003"}  # as an earlier version recorded it
    for began in (origin, typed_then):
        saved = Checkpoint(tmp_path / "b/checkpoints/step_00000001", 1, {"origin": began})
        for same in ("a", "a/checkpoints/step_00000003", "./b/../a/", tmp_path / "a"):
            check_origin(saved, Init(Path(same)))
        with pytest.raises(InputError, match=f"b: no such file or folder.* began from weights of {began['source']}"):
            check_origin(saved, Init(Path("b")))
