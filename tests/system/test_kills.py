"""Killed at random, saves included, and changed, a run is the undisturbed one: benchmarks/kills.py finds it so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"


def kills(folder: Path, count: int, commands: int, changes: int) -> None:
    words = ["--kills", count, "--commands", commands, "--changes", changes]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "runs/bench/kills.json").read_text())
    same, changed = found["same"], found["changed"]
    assert sum(same["kills"].values()) == count + commands
    assert same["equal"] == same["losses"] > same["steps"], "lost and repeated steps count as well"
    assert same["saves_hit"] >= count // 3
    assert same["checkpoints"] + changed["checkpoints"] > count
    assert sum(changed["kills"].values()) == 1 + 2 * changes
    assert changed["losses"] == 20 * changes
    assert changed["worst"] <= 1e-5
    assert same["wrong_ids"] == changed["wrong_ids"] == 0


def test_three_kills_and_a_change_of_layout(tmp_path):
    kills(tmp_path, 3, 0, 1)


@pytest.mark.long
def test_a_hundred_kills_ten_of_real_commands_and_ten_changes_of_layout(tmp_path):
    kills(tmp_path, 90, 10, 10)
