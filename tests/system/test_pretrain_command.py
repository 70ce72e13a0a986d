"""launch/pretrain.py as its users start it: the run folder, the console, launchers, refusals with status 2."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pretrain.ranks.launcher import free_port
from tests.conftest import history, lines

STEPS = 60
PRETRAIN = "launch/pretrain.py"


def deepspeed() -> tuple[object, ...]:
    return "deepspeed", "--quiet", "--master_port", free_port(), "--num_gpus", 2, PRETRAIN


@pytest.fixture(scope="module")
def config(digits: Path, tiny_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_config(
        tmp_path_factory.mktemp("config") / "tiny.json",
        model={"dropout": 0.1, "representation_size": 48},
        data={"eval": str(digits / "test"), "audit": True},
        train={"micro_batch": 6, "steps": STEPS},
        checkpoint={"every": 10},
        logging={"tensorboard": True},
        deepspeed={"zero_optimization": {"stage": 1}},
    )


@pytest.fixture(scope="module")
def undisturbed(config, real, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = real(*deepspeed(), "--config", config, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "console.txt").write_text(done.stdout + done.stderr)
    return out


def test_a_run_writes_its_folder_and_a_second_start_has_nothing_to_do(undisturbed, config, run, digits):
    told = history(undisturbed)
    assert [step for step, *_ in told.losses] == list(range(1, STEPS + 1))
    first = lines(undisturbed / "metrics.jsonl")[0]
    assert {"step", "images", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "mfu"} <= set(first)
    evaluation = told.metrics[-1]
    assert evaluation["step"] == STEPS
    assert 0 <= evaluation["eval/top1"] <= evaluation["eval/top5"] <= 1
    record = json.loads((undisturbed / "config.json").read_text())
    assert record["train"]["steps"] == STEPS
    assert {"torch", "deepspeed", "webdataset"} <= set(record["versions"])
    assert "git_commit" in record
    assert (undisturbed / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}"
    assert told.checkpoints == ["step_00000050", "step_00000060"]
    [scalars] = (undisturbed / "tensorboard").iterdir()
    for tag in (b"train/loss", b"time/training", b"time/waiting", b"time/saving", b"time/evaluating"):
        assert tag in scalars.read_bytes(), tag
    words = ("order", digits / "train", "--global-batch", 24, "--seed", 0, "--steps", f"0:{STEPS}")
    order = [json.loads(line) for line in run("launch/shards.py", *words).stdout.splitlines()]
    assert [line["ids"] for line in order] == told.ids

    again = run(PRETRAIN, "--config", config, "--out", undisturbed)
    assert again.returncode == 0
    assert again.stdout.startswith(f"{undisturbed}: finished at step {STEPS}"), again.stdout
    assert again.stderr == ""


def test_the_console_is_the_runs_own(undisturbed):
    """Every line is ours: nothing of torch or DeepSpeed."""
    ours = (
        "tiny: ",
        "data: ",
        "batch ",
        "memory of a rank: ",
        "step ",
        "saved ",
        "DeepSpeed compiles its CPU ops once",
    )
    foreign = [line for line in (undisturbed / "console.txt").read_text().splitlines() if not line.startswith(ours)]
    assert foreign == []


def test_torchrun_starts_it_too(config, real, tmp_path, undisturbed):
    words = ("torchrun", "--nproc-per-node", 2, "--master-port", free_port(), PRETRAIN, "--config", config)
    done = real(*words, "--out", tmp_path, "train.steps=8")
    assert done.returncode == 0, done.stderr
    shorter, longer = history(tmp_path).losses, history(undisturbed).losses
    # Decay starts after step index 5, so that only later updates know of the shorter schedule.
    assert shorter[:7] == longer[:7]
    assert shorter[7] != longer[7]


def expect_refusal(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert str(word) in done.stderr, f"{word!r} not in: {done.stderr}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.golbal_batch=24", ("train.golbal_batch", "did you mean train.global_batch?")),
        ("global_batch=24", ("global_batch", "did you mean train.global_batch?")),
        ("train.global_batch=many", ("train.global_batch", '"many"', "integer")),
        ("train.global_batch=25", ("train.global_batch", "25", "24 or 30")),
        ("model.arch=vit_b_15", ("model.arch", "vit_b_16")),
        ("deepspeed.gradient_clipping=1", ("gradient_clipping", "optimizer.clip_norm")),
        ("data.train=null", ("data.train", "launch/shards.py build")),
        ("data.train=/no/such/shards", ("/no/such/shards",)),
        ("model.num_classes=7", ("data.train", "model.num_classes=10")),
        ("schedule.final_lr=60", ("schedule.final_lr", "60")),
        ("train.epochs=0.001", ("train.epochs", "whole step")),
    ],
)
def test_bad_configs_are_refused_with_the_key_and_the_mend(override, words, config, run, tmp_path):
    expect_refusal(run(PRETRAIN, "--config", config, override, "--out", tmp_path), *words)
    assert not (tmp_path / "checkpoints").exists()


def test_the_launcher_passes_status_2_on_and_one_rank_speaks(config, real, tmp_path):
    done = real(*deepspeed(), "--config", config, "train.micro_batch=5", "--out", tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("error: train.global_batch") == 1


def test_a_truncated_tar_is_named(config, run, tmp_path, digits):
    shards = tmp_path / "shards"
    shutil.copytree(digits / "train", shards)
    tar = sorted(shards.glob("*.tar"))[0]
    os.truncate(tar, tar.stat().st_size // 2)
    expect_refusal(
        run(PRETRAIN, "--config", config, f"data.train={shards}", "--out", tmp_path / "run"), tar.name, "truncated"
    )


def test_evaluation_on_classes_that_are_numbered_otherwise_is_refused(config, run, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "pets" / name / "0.png")
    done = run("launch/shards.py", "build", tmp_path / "pets", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    done = run(PRETRAIN, "--config", config, f"data.eval={tmp_path / 'shards'}", "--out", tmp_path / "run")
    expect_refusal(done, "data.eval: class 0 is 'cat' here and '0' in data.train")


def test_a_run_of_another_model_or_seed_is_not_resumed(config, run, tmp_path, undisturbed):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    changed = run(PRETRAIN, "--config", config, "--out", out, "model.layers=4", "seed=3")
    expect_refusal(changed, "model.layers was 1, is 4", "seed was 0, is 3", "--out")
    longer = run(PRETRAIN, "--config", config, "--out", out, "train.steps=70")
    expect_refusal(longer, "train.steps was 60, is 70", "--extend")


def test_init_from_a_checkpoint_of_another_size_is_refused(config, run, tmp_path, undisturbed):
    done = run(PRETRAIN, "--config", config, "--out", tmp_path, "--init", undisturbed, "model.layers=4")
    expect_refusal(done, str(undisturbed), "of another network: layers is 1, the config's 4")
