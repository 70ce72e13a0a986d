"""data.held_out: a run that does not train on a share of its samples, and validates on them."""

import json

import pytest

from pretrain.index.index import Index
from pretrain.stream.heldout import hold_out
from tests.conftest import history

PRETRAIN = "launch/pretrain.py"
EPOCHS = 1.1


@pytest.fixture(scope="module")
def words(tiny_config, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    data = {"eval": str(digits / "test"), "audit": True, "held_out": 0.1}
    train = {"steps": None, "epochs": EPOCHS, "eval_every": 20}
    config = tiny_config(folder / "tiny.json", data=data, train=train, schedule={"decay": "constant"})
    return PRETRAIN, "--config", config, "--out", folder / "run"


def test_a_run_trains_on_all_but_what_is_held_out_and_validates_on_that(words, digits, run):
    trained, held = (set(ids.tolist()) for ids in hold_out(Index.open(digits / "train"), 0.1))
    begun = run(*words, "train.steps=20", ranks=2)
    assert begun.returncode == 0, begun.stderr
    assert f"data: {len(trained):,} samples in 1 shards ({len(held)} held out)" in begun.stdout
    assert "note: data.eval: not validated on, as data.held_out is 0.1" in begun.stdout
    done = run(*words, "--extend", ranks=2)
    assert done.returncode == 0, done.stderr
    told = history(words[-1])
    steps = len(told.ids)
    assert steps == round(EPOCHS * len(trained) / 24), "an epoch is of what is trained on"
    ids = [number for step in told.ids for number in step]
    assert set(ids[: len(trained)]) == trained
    assert set(ids) == trained

    options = ("--global-batch", 24, "--seed", 0, "--steps", f"0:{steps}", "--held-out", 0.1)
    order = [
        json.loads(line)
        for line in run("launch/shards.py", "order", digits / "train", *options).stdout.split("\n")
        if line
    ]
    assert [line["ids"] for line in order] == told.ids

    scores = [line["eval/top1"] for line in told.metrics if "eval/top1" in line]
    assert len(scores) == 3
    assert all(score * len(held) == pytest.approx(round(score * len(held))) for score in scores)
    assert any(score * 355 != pytest.approx(round(score * 355)) for score in scores), "not on data.eval"


def test_a_resume_may_not_hold_out_another_share(words, run):
    for share in (0, 0.2):
        done = run(*words, f"data.held_out={share}", "--extend", "train.steps=90")
        assert done.returncode == 2
        assert f"data.held_out was 0.1, is {float(share)}" in done.stderr
