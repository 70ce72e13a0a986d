"""Stopped on all ranks at the same step and started again, a run is bit for bit the one that was never stopped."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.weights.load import load_weights
from tests.conftest import RANKS, history

STEPS = 8


@pytest.mark.cuda
def test_every_stage_and_bf16_goes_on_bit_for_bit_and_evaluates(tiny_config, digits, ranks, tmp_path):
    config = tiny_config(
        tmp_path / "resume.json",
        model={"layers": 2, "mlp": 48, "heads": 2, "dropout": 0.1, "image_size": 16, "representation_size": 24},
        data={"eval": str(digits / "test"), "audit": True},
        train={"global_batch": 16, "micro_batch": 4, "steps": STEPS, "eval_every": 4},
        optimizer={"weight_decay": 0.1},
        schedule={"warmup_steps": 0},
    )
    stages = {f"zero{stage}": [f"deepspeed.zero_optimization.stage={stage}"] for stage in (0, 2, 3)}
    stages |= {
        f"zero{stage}_bf16": [f"deepspeed.zero_optimization.stage={stage}", "deepspeed.bf16.enabled=true"]
        for stage in (1, 3)
    }
    variants = {f"{name}/{kind}": changes for name, changes in stages.items() for kind in ("through", "halted")}
    ranks(RANKS, Path(__file__).with_name("variants.py"), config, tmp_path, json.dumps(variants))
    for name in stages:
        through, halted = (history(tmp_path / name / kind) for kind in ("through", "halted"))
        assert (halted.metrics, halted.audits) == (through.metrics, through.audits), name
        assert [step for step, _, _ in through.losses] == list(range(1, STEPS + 1))
        assert [line["step"] for line in through.metrics if "eval/top1" in line] == [4, 8]
        assert [[len(ids) for ids in audit] for audit in through.audits] == [[16 // RANKS] * STEPS] * RANKS
        assert len({loss for _, loss, _ in through.losses}) == STEPS, "it trains"
        weights, again = (load_weights(tmp_path / name / kind) for kind in ("through", "halted"))
        assert (again.sha256, weights.step) == (weights.sha256, STEPS), name
        low_bits = weights.tensors["blocks.0.mlp.fc1.weight"].view(torch.int32) & 0xFFFF
        assert (low_bits != 0).any(), f"{name}: the fp32 weights, not their rounding to bf16"
