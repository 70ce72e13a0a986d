"""launch/plan.py: the plan as JSON and as text, what it assumes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.system.inprocess import run_here

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = {
    "parameters", "flops_per_image", "fits", "zero_stage", "micro_batch", "per_rank_bytes", "step_seconds", "run_hours",
    "loader_cores", "read_bytes_per_second", "requests_per_second", "checkpoint_bytes",
}  # fmt: skip
MORE = {
    "host_bytes", "room_bytes", "largest_micro_batch", "why", "would_fit", "overrides", "steps", "images_per_second",
    "seconds", "sent_bytes_per_rank", "save_seconds", "grace_seconds", "gpu_hours", "money", "knobs", "assumptions",
}  # fmt: skip
PARTS = {"parameters", "gradients", "optimizer", "activations", "buffers", "total"}
MORE_PARTS = {"average", "on_host", "absent", "outside", "fragmentation"}
SAMPLES = 1442  # of the digits that are trained on
ONE_NODE = ("--nodes", 1, "--gpus-per-node", 8)


def plan(config, *words):
    """The plan as JSON, in the test's process, where the same network is traced once for all plans."""
    done = run_here("plan.py", "--config", config, *words, "--json")
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


def test_the_plan_of_h14():
    found = plan("h14.json", "--nodes", 8, "--gpus-per-node", 8, "--gpu-memory", 80, "--price-per-gpu-hour", 2)
    assert set(found) == CONTRACT | MORE
    assert set(found["per_rank_bytes"]) == PARTS | MORE_PARTS
    # The network of 633,685,480 values with 18,291 classes in place of 1,000.
    assert found["parameters"] == 633_685_480 + 17_291 * 1281 == 655_835_251
    assert found["fits"]
    assert found["zero_stage"] == 1
    assert found["micro_batch"] == 32
    assert found["checkpoint_bytes"] == 12 * found["parameters"]
    assert found["per_rank_bytes"]["total"] < found["room_bytes"] == 80 << 30
    assert found["steps"] == round(14 * 303_000_000 / 4096)
    assert found["run_hours"] == pytest.approx(found["steps"] * found["step_seconds"] / 3600)
    assert found["money"] == pytest.approx(2 * 64 * found["run_hours"])
    images = 4096 / found["step_seconds"]
    assert found["images_per_second"] == pytest.approx(images)
    assert found["requests_per_second"] == pytest.approx(images / 8)
    assert found["read_bytes_per_second"] == pytest.approx(images * 112_300)
    assert found["grace_seconds"] == pytest.approx(found["step_seconds"] + found["checkpoint_bytes"] / 2e9)
    assert found["overrides"] == []
    assert any("JFT-300M" in one for one in found["assumptions"])


def test_what_does_not_fit_is_planned_and_says_what_would():
    found = plan("h14.json", *ONE_NODE, "--gpu-memory", 8)
    assert not found["fits"]
    assert found["per_rank_bytes"]["total"] > 8 << 30
    assert found["would_fit"]
    for keys in found["would_fit"]:
        other = plan("h14.json", *ONE_NODE, "--gpu-memory", 8, *keys)
        assert other["fits"]
        assert other["per_rank_bytes"]["total"] <= 8 << 30
    text = run_here("plan.py", "--config", "h14.json", *ONE_NODE, "--gpu-memory", 8).stdout
    assert "DOES NOT FIT" in text
    assert f"would fit: {' '.join(found['would_fit'][0])}" in text


def test_a_micro_batch_that_is_not_possible_on_so_many_ranks_is_named():
    found = plan("b16.json", "--nodes", 64, "--gpus-per-node", 8, "--gpu-memory", 80)
    assert found["micro_batch"] == 8
    assert found["overrides"] == ["train.micro_batch=8"]
    assert any("128 does not divide a rank's 8 images" in one for one in found["assumptions"])


def test_the_data_are_those_of_the_index(digits, tiny_config, tmp_path):
    config = tiny_config(tmp_path / "tiny.json", train={"steps": None, "epochs": 3})
    found = plan(config, "--nodes", 1, "--gpus-per-node", 1, "--gpu-memory", 16)
    assert found["steps"] == round(3 * SAMPLES / 24)
    per_image = found["read_bytes_per_second"] / found["images_per_second"]
    shards = sum(path.stat().st_size for path in (digits / "train").glob("*.tar"))
    assert per_image == pytest.approx(shards / SAMPLES, rel=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config", "h14.json", "--nodes", 1, "--gpus-per-node", 7, "--gpu-memory", 80), "train.global_batch"),
        (("--config", "h14.json", *ONE_NODE, "--gpu-memory", 80, "--gpu", "h10"), "did you mean h100?"),
        (("--config", "h14.json", *ONE_NODE, "--gpu-memory", 0), "--gpu-memory: found '0'"),
        (("--config", "h14.json", *ONE_NODE, "--gpu-memory", 80, "model.num_classes=7"), "--samples N"),
        (("--config", "h14.json", *ONE_NODE, "--gpu-memory", 80, "train.micro_batc=2"), "did you mean"),
        (("--config", "finetune/pets.json", *ONE_NODE, "--gpu-memory", 80), "--init WEIGHTS"),
        (("--config", "finetune/pets.json", *ONE_NODE, "--gpu-memory", 80, "optimizer.rl=1"), "override optimizer.rl"),
        (("--config", "h14.json", *ONE_NODE, "--gpu-memory", 80, "--mfu", 40), "--mfu: found '40'; a share above 0"),
        (
            ("--config", "h14.json", *ONE_NODE, "--gpu-memory", 32, "--gpu", "v100", "deepspeed.bf16.enabled=true"),
            "v100 has no bf16",
        ),
    ],
)
def test_what_is_at_fault_is_status_2(run, words, message):
    done = run("launch/plan.py", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_not_measured(run):
    words = ("--config", "b16.json", *ONE_NODE, "--gpu-memory", 80, "--measure", "--device", "cuda")
    done = run("launch/plan.py", *words)
    assert done.returncode == 2
    assert "this machine has no such device" in done.stderr


def test_what_is_measured_replaces_what_is_assumed(run, tiny_config, tmp_path):
    config = tiny_config(tmp_path / "tiny.json", train={"global_batch": 24, "micro_batch": 12})
    words = ("--nodes", 1, "--gpus-per-node", 1, "--gpu-memory", 4, "--measure", "--json")
    done = run("launch/plan.py", "--config", config, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    said = " ".join(found["assumptions"])
    assert "the device at hand" in said
    assert "forward and backward passes of the whole network, micro-batch 12" in said
    assert "a thread decodes an image of data.train in" in said
    assert 0 < found["step_seconds"] < 5  # a tiny network, on however busy a machine
    assert found["seconds"]["communication"] == 0


def test_it_imports_nothing_that_takes_long():
    """In the end, and of what torch loads to trace, in a second or more: nothing before the first line."""
    code = (
        "import sys; sys.argv = ['launch/plan.py', *sys.argv[1:]]; import runpy\n"
        "import os; leave = os._exit\n"
        "def seen(*heavy):\n"
        "    print(sorted({*heavy} & set(sys.modules)), file=sys.stderr)\n"
        "def ended(status):\n"
        "    seen('deepspeed', 'torchvision', 'matplotlib', 'transformers', 'timm', 'pandas', 'scipy'); leave(status)\n"
        "from pretrain.plan import plan; make_plan = plan.make_plan\n"
        "def made(*given):\n"
        "    print('planned', flush=True); seen('torch._dynamo', 'sympy'); return make_plan(*given)\n"
        "os._exit, plan.make_plan = ended, made\n"
        "runpy.run_path('launch/plan.py', run_name='__main__')"
    )
    words = ["--config", "b16.json", *ONE_NODE, "--gpu-memory", 40]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    first, second, *_ = done.stdout.splitlines()
    assert first.endswith(" on 1 × 8 NVIDIA A100-SXM4-40GB, 40.0 GiB each")
    assert second == "planned"
    assert done.stderr == "[]\n[]\n"
