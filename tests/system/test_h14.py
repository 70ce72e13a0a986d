"""The 633 M-parameter network takes real optimizer steps on a host of 24 GB, by the documented command."""

import json
import sys

import pytest

from pretrain.ranks.launcher import free_port

# Runs a command; then prints the most memory, in KiB, that any of its processes has had: the rank's.
MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.long
def test_h14_takes_two_optimizer_steps_in_fp32_and_writes_a_checkpoint(digits, real, tmp_path):
    changes = (
        f"data.train={digits / 'train'}", "model.num_classes=1000", "schedule.warmup_steps=0",
        "train.micro_batch=1", "train.global_batch=1", "train.steps=2", "logging.every=1",
    )  # fmt: skip
    done = real(
        sys.executable,
        "-c",
        MEASURED,
        "deepspeed",
        "--master_port",
        free_port(),
        "launch/pretrain.py",
        "--config",
        "h14.json",
        "--out",
        tmp_path,
        *changes,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["lr"] > 0 for line in lines)
    state = json.loads((tmp_path / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert state["config"]["precision"] == "float32"
    # fp32 parameters and two Adam moments of 633,685,480 parameters, at the least.
    assert sum(file["bytes"] for file in state["files"].values()) > 3 * 4 * 633_685_480
    # With the gradients they are 10.1 GB.
    assert 10.1e9 < 1024 * int(done.stdout.splitlines()[-1]) < 14e9
