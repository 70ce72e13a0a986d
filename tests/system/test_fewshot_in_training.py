"""The few-shot score that a run logs, and that of its checkpoint afterwards."""

import json

import pytest


@pytest.mark.long
def test_in_the_runs_arithmetic_the_score_afterwards_is_the_logged_one(run, digits, tmp_path):
    network = {"patch_size": 2, "layers": 2, "width": 32, "mlp": 64, "heads": 2, "image_size": 8, "channels": 1}
    indices = {"support": str(digits / "train"), "query": str(digits / "test")}
    protocol = {"shots": [1, 5], "seeds": [0, 1]}
    trained = {
        "name": "half",
        "model": {**network, "num_classes": 10, "representation_size": 16},
        "data": {"train": str(digits / "train"), "workers": 1},
        "train": {"global_batch": 64, "steps": 20},
        "optimizer": {"lr": 2e-3, "averaging": {"decay": 0.9}},
        "schedule": {"warmup_steps": 5},
        "fewshot": {**indices, **protocol, "every": 10},
        "deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    }
    after = {
        "name": "after",
        "data": {**indices, "workers": 1},
        "fewshot": {**protocol, "features": ["tanh"], "probes": ["ridge"], "oracle": False},
    }
    for config in (trained, after):
        (tmp_path / f"{config['name']}.json").write_text(json.dumps(config))
    runs = tmp_path / "run"
    done = run("launch/pretrain.py", "--config", tmp_path / "half.json", "--out", runs)
    assert done.returncode == 0, done.stderr
    logged = json.loads((runs / "metrics.jsonl").read_text().splitlines()[-1])
    words = ["--config", tmp_path / "after.json", "--init", runs, "--weights", "both", "--out", tmp_path / "out"]
    scores = {}
    for dtype in ("bfloat16", "float32"):
        done = run("launch/fewshot.py", *words, f"fewshot.dtype={dtype}")
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
        scores[dtype] = {(row["weights"], row["shots"]): row["mean"] for row in report["summary"]}
        assert dtype in report["protocol"]["arithmetic"]
    assert scores["bfloat16"] == {
        (weights, shots): logged[f"{prefix}fewshot/{shots}shot_ridge_bfloat16"]
        for weights, prefix in (("run", ""), ("run averaged", "averaged/"))
        for shots in (1, 5)
    }
    assert scores["float32"] != scores["bfloat16"]
