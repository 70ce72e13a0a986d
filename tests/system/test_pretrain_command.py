"""launch/pretrain.py as its users start it: resumes after a kill, stops on request, refuses bad input with status 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pretrain.ranks.launcher import free_port

STEPS = 60
DEEPSPEED = ("deepspeed", "--quiet", "--master_port", free_port(), "--num_gpus", 2, "launch/pretrain.py")
PYTHON = (sys.executable, "launch/pretrain.py")


@pytest.fixture(scope="module")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    tree = {
        "name": "tiny",
        "model": {
            "patch_size": 4, "layers": 3, "width": 48, "mlp": 96, "heads": 3, "dropout": 0.1,
            "image_size": 16, "channels": 1, "num_classes": 10, "representation_size": 48,
        },
        "data": {"train": str(digits / "train"), "eval": str(digits / "test"), "workers": 1, "audit": True},
        "train": {"global_batch": 24, "micro_batch": 6, "steps": STEPS},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 5},
        "checkpoint": {"every": 10},
        "logging": {"every": 1, "peak_tflops": 0.1},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }  # fmt: skip
    path.write_text(json.dumps(tree))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [
        (line["step"], line["loss"], line["grad_norm"]) for line in lines(folder / "metrics.jsonl") if "loss" in line
    ]


@pytest.fixture(scope="module")
def undisturbed(config, run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    done = run(*DEEPSPEED, "--config", config, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "console.txt").write_text(done.stdout + done.stderr)
    return out


def test_a_run_writes_its_folder_and_keeps_the_console_clean(undisturbed, config, run):
    assert [step for step, *_ in losses(undisturbed)] == list(range(1, STEPS + 1))
    first = lines(undisturbed / "metrics.jsonl")[0]
    assert {"step", "images", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait", "mfu"} <= set(first)
    evaluation = lines(undisturbed / "metrics.jsonl")[-1]
    assert evaluation["step"] == STEPS
    assert 0 <= evaluation["eval/top1"] <= evaluation["eval/top5"] <= 1
    record = json.loads((undisturbed / "config.json").read_text())
    assert record["train"]["steps"] == STEPS
    assert {"torch", "deepspeed", "webdataset"} <= set(record["versions"])
    assert "git_commit" in record
    assert (undisturbed / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}"
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step_00000050", "step_00000060"]
    assert any((undisturbed / "tensorboard").iterdir())

    again = run(*PYTHON, "--config", config, "--out", undisturbed)
    assert again.returncode == 0
    assert again.stdout.startswith(f"{undisturbed}: finished at step {STEPS}"), again.stdout
    assert again.stderr == ""


def test_the_console_is_the_runs_own(undisturbed):
    """Every line is ours: nothing of torch or DeepSpeed."""
    ours = ("tiny: ", "data: ", "batch ", "step ", "saved ", "DeepSpeed compiles its CPU ops once")
    foreign = [line for line in (undisturbed / "console.txt").read_text().splitlines() if not line.startswith(ours)]
    assert foreign == []


def test_killed_and_started_again_it_is_the_same_run_bit_for_bit(undisturbed, config, run, tmp_path, digits):
    command = [str(word) for word in (*DEEPSPEED, "--config", config, "--out", tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 23):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = metrics.read_text().count("\n")
    assert reached < STEPS, "the run was over before it was killed"

    done = run(*DEEPSPEED, "--config", config, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in done.stdout
    assert losses(tmp_path) == losses(undisturbed)

    order = run(
        sys.executable,
        "launch/shards.py",
        "order",
        digits / "train",
        "--global-batch",
        24,
        "--seed",
        0,
        "--steps",
        f"0:{STEPS}",
    )
    audits = [lines(tmp_path / "audit" / f"rank_{rank:05d}.jsonl") for rank in range(2)]
    trained = [{"step": a["step"], "ids": a["ids"] + b["ids"]} for a, b in zip(*audits, strict=True)]
    assert trained == [json.loads(line) for line in order.stdout.splitlines()]


@pytest.mark.parametrize("how", ["file", "sigterm", "time limit"])
def test_asked_to_stop_it_saves_and_goes_on_from_there(how, config, run, tmp_path, undisturbed):
    words = [
        str(word)
        for word in (*PYTHON, "--config", config, "--out", tmp_path, "train.micro_batch=24", "train.steps=2000")
    ]
    limit = ["train.time_limit_minutes=0.005"] if how == "time limit" else []
    process = subprocess.Popen([*words, *limit], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    if how != "time limit":
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if how == "file":
            (tmp_path / "STOP").touch()
        else:
            process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 75, said + errors
    assert "stopped: " in said
    stopped_at = lines(metrics)[-1]["step"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{stopped_at:08d}"
    assert not (tmp_path / "STOP").exists()

    done = run(*words, f"train.steps={stopped_at + 6}", "--extend")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(metrics) if "loss" in line] == list(range(1, stopped_at + 7))


def test_torchrun_starts_it_too(config, run, tmp_path, undisturbed):
    done = run(
        "torchrun", "--nproc-per-node", 2, "launch/pretrain.py", "--config", config, "--out", tmp_path, "train.steps=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Decay starts after step index 5, so that only later updates know of the shorter schedule.
    assert losses(tmp_path)[:7] == losses(undisturbed)[:7]
    assert losses(tmp_path)[7] != losses(undisturbed)[7]


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
    expect_refusal(run(*PYTHON, "--config", config, override, "--out", tmp_path), *words)
    assert not (tmp_path / "checkpoints").exists()


def test_the_launcher_passes_status_2_on_and_one_rank_speaks(config, run, tmp_path):
    done = run(*DEEPSPEED, "--config", config, "train.micro_batch=5", "--out", tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("error: train.global_batch") == 1


def test_a_truncated_tar_is_named(config, run, tmp_path, digits):
    shards = tmp_path / "shards"
    shutil.copytree(digits / "train", shards)
    tar = sorted(shards.glob("*.tar"))[0]
    os.truncate(tar, tar.stat().st_size // 2)
    expect_refusal(
        run(*PYTHON, "--config", config, f"data.train={shards}", "--out", tmp_path / "run"), tar.name, "truncated"
    )


def test_evaluation_on_classes_that_are_numbered_otherwise_is_refused(config, run, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "pets" / name / "0.png")
    done = run(sys.executable, "launch/shards.py", "build", tmp_path / "pets", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    done = run(*PYTHON, "--config", config, f"data.eval={tmp_path / 'shards'}", "--out", tmp_path / "run")
    expect_refusal(done, "data.eval: class 0 is 'cat' here and '0' in data.train")


def test_a_run_of_another_model_or_seed_is_not_resumed(config, run, tmp_path, undisturbed):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    changed = run(*PYTHON, "--config", config, "--out", out, "model.layers=4", "seed=3")
    expect_refusal(changed, "model.layers was 3, is 4", "seed was 0, is 3", "--out")
    longer = run(*PYTHON, "--config", config, "--out", out, "train.steps=70")
    expect_refusal(longer, "train.steps was 60, is 70", "--extend")


def test_init_from_a_checkpoint_of_another_size_is_refused(config, run, tmp_path, undisturbed):
    done = run(*PYTHON, "--config", config, "--out", tmp_path, "--init", undisturbed, "model.layers=4")
    expect_refusal(done, str(undisturbed), "of another network: layers is 3, the config's 4")


def test_a_damaged_checkpoint_is_passed_over(config, run, tmp_path, undisturbed):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    victim = next((out / "checkpoints" / "step_00000060").glob("optimizer.*"))
    os.truncate(victim, victim.stat().st_size - 100)
    done = run(*DEEPSPEED, "--config", config, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"passed over: checkpoint {out}/checkpoints/step_00000060: damaged: {victim.name}" in done.stdout
    assert "resumed from" in done.stdout
    assert losses(out) == losses(undisturbed)
    assert (out / "checkpoints" / "damaged_00000060").is_dir(), "kept for inspection, and out of the way"


def test_where_no_checkpoint_can_be_read_the_run_is_not_started_over(config, run, tmp_path, undisturbed):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for state in (out / "checkpoints").glob("step_*/state.json"):
        state.unlink()
    expect_refusal(run(*PYTHON, "--config", config, "--out", out), "step_00000060", "none that can be read")
    assert len(losses(out)) == STEPS
