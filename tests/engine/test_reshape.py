"""Checkpoint by some ranks under one ZeRO stage, a run goes on on others, under another, as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.step import Checkpoint
from tests.conftest import lines

HALF, STEPS = 6, 12
SCRIPT = Path(__file__).with_name("variants.py")


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
def test_any_ranks_and_stage_go_on_with_the_same_losses_ids_and_average(world, begun, tiny_config, ranks, tmp_path):
    config = tiny_config(
        tmp_path / "reshape.json",
        # Sizes that no number of ranks here divides: fragments begin and end inside of parameters.
        model={"layers": 2, "width": 20, "mlp": 37, "heads": 2, "image_size": 16, "representation_size": 19},
        data={"audit": True},
        train={"global_batch": 12, "steps": STEPS},
        optimizer={"weight_decay": 0.1, "averaging": {"decay": 0.9, "start_step": 2}},
        schedule={"warmup_steps": 0},
        checkpoint={"every": HALF, "keep": 3},
    )
    ranks(world, SCRIPT, config, tmp_path, json.dumps({"whole": begun}))
    expected, half = losses(tmp_path / "whole"), tmp_path / "half"
    saved = Checkpoint.read(tmp_path / "whole" / "checkpoints" / f"step_{STEPS:08d}")
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(half / "checkpoints" / f"step_{STEPS:08d}")
    for now, variants in {
        1: {"1_zero2": stage(2, "train.micro_batch=3")},
        2: {"2_zero0": stage(0), "2_zero3": stage(3, "train.micro_batch=2")},
        3: {"3_zero1": stage(1), "3_zero2": stage(2, "train.micro_batch=2")},
    }.items():
        ranks(now, SCRIPT, config, tmp_path, json.dumps(variants), half)
        for name in variants:
            assert losses(tmp_path / name)[:HALF] == expected[:HALF]
            assert losses(tmp_path / name) == pytest.approx(expected, rel=0, abs=1e-5), name
            assert ids_after_half(tmp_path / name, now) == ids_after_half(tmp_path / "whole", world)
            again = Checkpoint.read(tmp_path / name / "checkpoints" / f"step_{STEPS:08d}")
            assert again.state["updates"] == saved.state["updates"] == STEPS
            assert set(again.state["fingerprints"]) == {"weight", "exp_avg", "exp_avg_sq", "average"}


def losses(run: Path) -> list[float]:
    told = [(line["step"], line["loss"]) for line in lines(run / "metrics.jsonl")]
    assert [step for step, _ in told] == list(range(1, STEPS + 1))
    return [loss for _, loss in told]


def ids_after_half(run: Path, world: int) -> list[list[int]]:
    """The ids of steps HALF … STEPS, in batch order, as `world` ranks trained on them."""
    audits = [lines(run / "audit" / f"rank_{rank:05d}.jsonl")[-HALF:] for rank in range(world)]
    return [[id for line in step for id in line["ids"]] for step in zip(*audits, strict=True)]
