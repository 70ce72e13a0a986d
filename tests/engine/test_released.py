"""A run that is one of several in a process leaves no memory behind."""

from pathlib import Path

from tests.conftest import RANKS


def test_engines_of_every_stage_are_freed(ranks, tiny_config, tmp_path):
    config = tiny_config(tmp_path / "tiny.json", train={"steps": 3}, schedule={"warmup_steps": 1})
    ranks(RANKS, Path(__file__).parent / "released.py", config, tmp_path)
