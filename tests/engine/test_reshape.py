"""Checkpoint by some ranks under one ZeRO stage, a run goes on on others, under another, as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.step import Checkpoint

HALF, STEPS = 6, 12


def config_with(path: Path, digits: Path, **train: object) -> Path:
    config = {
        "name": "reshape",
        "model": {
            # Sizes that no number of ranks here divides: fragments begin and end inside of parameters.
            "patch_size": 4, "layers": 2, "width": 20, "mlp": 37, "heads": 2,
            "image_size": 16, "channels": 1, "num_classes": 10, "representation_size": 19,
        },
        "data": {"train": str(digits / "train"), "workers": 1, "audit": True},
        "train": {"global_batch": 12, "steps": STEPS, **train},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "averaging": {"decay": 0.9, "start_step": 2}},
        "schedule": {"warmup_steps": 0},
        "checkpoint": {"every": HALF, "keep": 3},
        "logging": {"every": 1, "tensorboard": False, "peak_tflops": 1},
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return path


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def audit(run: Path, world: int) -> list[list[int]]:
    """The ids of steps HALF … STEPS, in batch order."""
    ranks = [
        [json.loads(line)["ids"] for line in (run / "audit" / f"rank_{rank:05d}.jsonl").read_text().splitlines()]
        for rank in range(world)
    ]
    return [[id for ids in ranks for id in ids[step - STEPS]] for step in range(HALF, STEPS)]


def begin(ranks, config: Path, tmp_path: Path, world: int, changes: list[str]) -> Path:
    """A run of STEPS steps, and a copy of it as it stood after HALF."""
    ranks(
        world, Path(__file__).parent / "reshape.py", config, tmp_path / "none", tmp_path, json.dumps({"whole": changes})
    )
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(half / "checkpoints" / f"step_{STEPS:08d}")
    return half


def stage(number: int, *more: str) -> list[str]:
    return [f"deepspeed.zero_optimization.stage={number}", *more]


@pytest.mark.parametrize(
    ("world", "begun"),
    [
        (2, stage(1)),
        pytest.param(3, stage(3), marks=pytest.mark.long),
        pytest.param(1, stage(0), marks=pytest.mark.long),
    ],
)
def test_any_ranks_and_stage_go_on_with_the_same_losses_ids_and_average(world, begun, digits, ranks, tmp_path):
    config = config_with(tmp_path / "reshape.json", digits)
    half = begin(ranks, config, tmp_path, world, begun)
    expected, batches = losses(tmp_path / "whole"), audit(tmp_path / "whole", world)
    saved = Checkpoint.read(tmp_path / "whole" / "checkpoints" / f"step_{STEPS:08d}")
    for now, variants in {
        1: {"1_zero2": stage(2, "train.micro_batch=3")},
        2: {"2_zero0": stage(0), "2_zero3": stage(3, "train.micro_batch=2")},
        3: {"3_zero1": stage(1), "3_zero2": stage(2, "train.micro_batch=2")},
    }.items():
        ranks(now, Path(__file__).parent / "reshape.py", config, half, tmp_path, json.dumps(variants))
        for name in variants:
            assert losses(tmp_path / name) == pytest.approx(expected, rel=0, abs=1e-5), name
            assert losses(tmp_path / name)[:HALF] == expected[:HALF]
            assert audit(tmp_path / name, now) == batches
            again = Checkpoint.read(tmp_path / name / "checkpoints" / f"step_{STEPS:08d}")
            assert again.state["updates"] == saved.state["updates"] == STEPS
            assert set(again.state["fingerprints"]) == {"weight", "exp_avg", "exp_avg_sq", "average"}
