"""Stopped on all ranks at the same step and started again, a run is bit for bit the one that was never stopped."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.weights.load import load_weights

STEPS = 8


@pytest.fixture(scope="module")
def config_file(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "name": "resume",
        "model": {
            "patch_size": 4, "layers": 2, "width": 24, "mlp": 48, "heads": 2, "dropout": 0.1,
            "image_size": 16, "channels": 1, "num_classes": 10, "representation_size": 24,
        },
        "data": {"train": str(digits / "train"), "eval": str(digits / "test"), "workers": 1, "audit": True},
        "train": {"global_batch": 16, "micro_batch": 4, "steps": STEPS, "eval_every": 4},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 0},
        "logging": {"every": 1, "tensorboard": False, "peak_tflops": 1},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("resume") / "resume.json"
    path.write_text(json.dumps(config))
    return path


def test_every_stage_and_bf16_goes_on_bit_for_bit_and_evaluates(config_file, ranks, tmp_path):
    variants = {f"zero{stage}": [f"deepspeed.zero_optimization.stage={stage}"] for stage in (0, 2, 3)}
    variants |= {
        f"zero{stage}_bf16": [f"deepspeed.zero_optimization.stage={stage}", "deepspeed.bf16.enabled=true"]
        for stage in (1, 3)
    }
    ranks(2, Path(__file__).parent / "goes_on.py", config_file, tmp_path, json.dumps(variants))
    for name in variants:
        told = {}
        for kind in ("through", "halted"):
            text = (tmp_path / name / kind / "metrics.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            told[kind] = [
                (
                    line["step"],
                    {key: line[key] for key in ("loss", "grad_norm", "eval/loss", "eval/top1") if key in line},
                )
                for line in lines
            ]
            assert [step for step, values in told[kind] if "loss" in values] == list(range(1, STEPS + 1)), name
            assert [step for step, values in told[kind] if "eval/top1" in values] == [4, 8], name
            for rank in range(2):
                audit = (tmp_path / name / kind / "audit" / f"rank_{rank:05d}.jsonl").read_text().splitlines()
                assert [len(json.loads(line)["ids"]) for line in audit] == [8] * STEPS
        assert told["halted"] == told["through"], name
        weights = {kind: load_weights(tmp_path / name / kind) for kind in told}
        assert weights["halted"].sha256 == weights["through"].sha256, name
        assert weights["through"].step == STEPS
        low_bits = weights["through"].tensors["blocks.0.mlp.fc1.weight"].view(torch.int32) & 0xFFFF
        assert (low_bits != 0).any(), f"{name}: the fp32 weights, not their rounding to bf16"
        assert len({values["loss"] for _, values in told["through"] if "loss" in values}) == STEPS, "it trains"
