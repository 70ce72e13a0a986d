"""The few-shot score that a run logs, and that of its checkpoint afterwards."""

import json

import pytest

from tests.conftest import history


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_trains_bit_for_bit_as_without_it(run, digits, tiny_config, tmp_path, stage):
    """Losses and gradient norms too are equal, with all that draws at random switched on."""
    plain = tiny_config(
        tmp_path / "plain.json",
        model={"dropout": 0.2, "drop_path": 0.2, "layers": 2},
        data={"mixup": 0.4, "audit": True},
        train={"steps": 3},
        optimizer={"averaging": {"decay": 0.9}},
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    section = {"every": 1, "support": str(digits / "train"), "query": str(digits / "test"), "shots": [5]}
    scored = tmp_path / "scored.json"
    scored.write_text(json.dumps(json.loads(plain.read_text()) | {"fewshot": section}))
    found = {}
    for config in (plain, scored):
        done = run("launch/pretrain.py", "--config", config, "--out", tmp_path / config.stem, ranks=2)
        assert done.returncode == 0, done.stderr
        found[config.stem] = history(tmp_path / config.stem)
    assert found["scored"].trained == found["plain"].trained
    assert [step for step, *_ in found["plain"].losses] == [1, 2, 3]
    names = {"fewshot/5shot_ridge", "averaged/fewshot/5shot_ridge"}
    assert [line["step"] for line in found["scored"].metrics if names <= set(line)] == [1, 2, 3]


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
