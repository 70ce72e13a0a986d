"""A run against its plan: refused where it cannot fit, and compared with what it takes."""

import json
from dataclasses import replace

import pytest
import torch

from pretrain.checkpoint.section import CheckpointSection
from pretrain.engine.layout import batch_layout
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.plan import measured
from pretrain.plan.fit import with_micro_batch
from pretrain.plan.job import Cluster, Job
from pretrain.plan.measured import Comparison, expected
from pretrain.ranks.collectives import World
from pretrain.stream.section import DataSection

ALONE = World(0, 1, 0, torch.device("cpu"))
SMALL = ViTSpec(patch_size=4, layers=2, width=64, mlp=128, heads=2, image_size=32, num_classes=10)
ALWAYS_PLANNED = "from pretrain.plan import measured\nmeasured._NOT_WORTH_IT = 0\n"


def job(spec: ViTSpec = SMALL, micro_batch: int = 1024) -> Job:
    return Job(
        spec,
        batch_layout(1024, micro_batch, 1),
        torch.float32,
        "softmax",
        "none",
        False,
        0,
        OptimizerSection(lr=1e-3),
        DeepSpeedSection(),
        DataSection(),
        CheckpointSection(),
        10,
        "cpu",
    )


def test_what_cannot_fit_is_refused_with_a_change_that_makes_it_fit(monkeypatch):
    monkeypatch.setattr(measured, "memory_of", lambda device: 700 << 20)
    with pytest.raises(InputError, match=r"what would fit: .*train\.micro_batch=(\d+)") as refused:
        expected(job(), ALONE, 1e3)
    micro = int(str(refused.value).partition("train.micro_batch=")[2].split(",")[0].split(" ")[0])
    smaller = with_micro_batch(job(), micro)
    found = expected(smaller, ALONE, 1e3)
    assert micro > 1
    assert found is not None
    assert found.peak + (512 << 20) <= 700 << 20


def test_what_needs_little_is_not_planned(monkeypatch):
    monkeypatch.setattr(measured, "refusal", lambda *_: pytest.fail("half a second for nothing"))
    monkeypatch.setattr(measured, "memory_of", lambda device: 1 << 40)
    assert expected(job(), ALONE, 1e3) is None


@pytest.mark.parametrize("name", ["vit_ti_16", "vit_b_32", "vit_h_14"])
def test_what_is_not_planned_would_have_fitted(name):
    from pretrain.model.spec import spec_from_arch
    from pretrain.plan.memory.rank import rank_memory

    for one in (job(spec_from_arch(name), 16), job(spec_from_arch(name, num_classes=20_000), 1)):
        rough = measured._roughly(one)
        assert rank_memory(one).total < rough / measured._NOT_WORTH_IT / 8


def test_times_are_planned_for_a_device_that_is_known():
    known = Cluster(1, 8, 80 << 30, 989.4e12, "NVIDIA H100 80GB HBM3")
    on_gpu = replace(job(), device="cuda", dtype=torch.bfloat16)
    assert measured._step_seconds(on_gpu, known) > 0
    assert measured._step_seconds(on_gpu, replace(known, device_name="another")) is None


def test_a_run_that_was_not_planned_is_measured_all_the_same():
    held = {"parameters": 4, "optimizer": 8, "average": 0}
    compared = Comparison(None, measured.Meter(ALONE.device), held)
    values = compared.values(20, None, 0.5)
    assert values["memory/step"] == 8
    assert not any(name.startswith("plan/") for name in values)
    assert "planned" not in compared.line(values)


def test_plan_and_measurement_stand_in_a_run_s_metrics_once(tmp_path, tiny_config, run):
    config = tiny_config(tmp_path / "c.json", train={"global_batch": 24, "steps": 3})
    done = run("launch/pretrain.py", "--config", config, "--out", tmp_path / "run", ranks=2, prelude=ALWAYS_PLANNED)
    assert done.returncode == 0, done.stderr
    first, second, third = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert "memory/peak" in first
    assert "memory/peak" in third
    assert not any(name.startswith("plan/") for name in (*first, *third))
    for part in ("parameters", "optimizer", "average"):
        assert second[f"plan/memory/{part}"] == second[f"memory/{part}"]
    assert second["memory/parameters"] > 0
    assert second["memory/optimizer"] > 0
    assert done.stdout.count("memory of a rank: ") == 1
    assert ", planned " in done.stdout


def test_a_run_that_cannot_fit_ends_before_there_is_a_network(tmp_path, tiny_config, run):
    little = f"{ALWAYS_PLANNED}measured.memory_of = lambda device: 1 << 20\n"
    little += "from pretrain.training import experiment\nexperiment.build = None\n"
    words = ("launch/pretrain.py", "--config", tiny_config(tmp_path / "c.json"), "--out", tmp_path / "run")
    done = run(*words, ranks=2, prelude=little)
    assert done.returncode == 2
    assert "memory: a rank needs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1])
def test_a_large_run_takes_what_was_planned(stage, tmp_path, tiny_config, run):
    """Of 60 million parameters. glibc would keep some of what is freed, up to a third more under ZeRO 1: here each
    tensor has pages of its own, which go back to the system.
    """
    network = {"patch_size": 1, "layers": 5, "width": 1024, "mlp": 4096, "heads": 16, "image_size": 8}
    config = tiny_config(
        tmp_path / "c.json",
        model={**network, "channels": 1, "num_classes": 10},
        train={"global_batch": 8, "steps": 2},
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    apart = "import ctypes\nctypes.CDLL(None).mallopt(-3, 1 << 16)\nctypes.CDLL(None).mallopt(-4, 1 << 30)\n"
    prelude = f"{ALWAYS_PLANNED}{apart}"
    done = run("launch/pretrain.py", "--config", config, "--out", tmp_path / "run", prelude=prelude)
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    for part in ("parameters", "optimizer"):
        assert line[f"plan/memory/{part}"] == line[f"memory/{part}"]
    assert line["memory/peak"] == pytest.approx(line["plan/memory/peak"], rel=0.1)
