"""Killed at random, saves included, and changed, a run is the undisturbed one: benchmarks/kills.py finds it so."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import kills


@pytest.fixture
def live(tmp_path, monkeypatch):
    return lambda count, commands, changes: _live(tmp_path, monkeypatch, count, commands, changes)


def _live(folder: Path, monkeypatch, count: int, commands: int, changes: int) -> None:
    words = ["--kills", count, "--commands", commands, "--changes", changes]
    monkeypatch.setattr(sys, "argv", ["kills.py", *map(str, words)])
    monkeypatch.chdir(folder)
    assert kills.main() == 0
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


def test_three_kills_and_a_change_of_layout(live):
    live(3, 0, 1)


@pytest.mark.long
def test_a_hundred_kills_ten_of_real_commands_and_ten_changes_of_layout(live):
    live(90, 10, 10)
