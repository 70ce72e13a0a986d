"""Real runs killed with SIGKILL and gone on with on other numbers of ranks and threads."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.index.index import Index
from pretrain.ranks.launcher import free_port
from pretrain.stream.order import Order

STEPS, BATCH = 120, 24
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(digits: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    tree = {
        "name": "tiny",
        "model": {
            "patch_size": 4, "layers": 1, "width": 24, "mlp": 24, "heads": 3,
            "image_size": 8, "channels": 1, "num_classes": 10,
        },
        "data": {"train": str(digits / "train"), "audit": True},
        "train": {"global_batch": BATCH, "steps": STEPS},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 5},
        "checkpoint": {"every": 7},
        "logging": {"every": 1, "peak_tflops": 0.1, "tensorboard": False},
    }  # fmt: skip
    path.write_text(json.dumps(tree))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps_done(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return max((line["step"] for line in lines(metrics)), default=0) if metrics.exists() else 0


def start(config: Path, out: Path, world: int, workers: int) -> subprocess.Popen:
    command = [
        "deepspeed",
        "--quiet",
        "--master_port",
        str(free_port()),
        "--num_gpus",
        world,
        "launch/pretrain.py",
        "--config",
        config,
        "--out",
        out,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.Popen(
        [*map(str, command), f"data.workers={workers}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out / "metrics.jsonl")]


@pytest.mark.long
def test_five_kills_on_one_two_four_and_three_ranks_lose_and_repeat_nothing(config, digits, tmp_path):
    draw = random.Random(1)
    kills = sorted(draw.sample(range(5, STEPS - 5), 5))
    out = tmp_path / "out"
    for world, kill in zip((1, 2, 4, 3, 1), kills, strict=True):
        process = start(config, out, world, draw.randint(1, 3))
        deadline = time.monotonic() + 300
        while steps_done(out) < kill and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, said  # it was still running
        assert kill <= steps_done(out) < STEPS, said
    process = start(config, out, 2, 2)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said

    index = Index.open(digits / "train")
    order = Order(index.samples, BATCH, seed=0)
    trained: dict[int, list[int]] = {step: [] for step in range(STEPS)}
    for path in sorted((out / "audit").glob("rank_?????.jsonl")):
        for line in lines(path):
            trained[line["step"]] += line["ids"]
    assert trained == {step: order.ids(step).tolist() for step in range(STEPS)}
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == list(range(1, STEPS + 1))

    undisturbed = start(config, tmp_path / "undisturbed", 2, 1)
    assert undisturbed.wait(timeout=300) == 0
    assert losses(out) == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-5)
