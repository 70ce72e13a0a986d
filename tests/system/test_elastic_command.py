"""Real runs killed with SIGKILL and resumed on other numbers of ranks and threads."""

import random
import time
from pathlib import Path

import pytest

from benchmarks.started import Command
from pretrain.index.index import Index
from pretrain.stream.order import Order
from tests.conftest import lines

STEPS, BATCH = 120, 24


@pytest.fixture
def config(tiny_config, tmp_path: Path) -> Path:
    return tiny_config(tmp_path / "tiny.json", data={"audit": True}, train={"steps": STEPS}, checkpoint={"every": 7})


def steps_done(out: Path) -> int:
    return max((line["step"] for line in lines(out / "metrics.jsonl")), default=0)


@pytest.mark.long
def test_five_kills_on_one_two_four_and_three_ranks_lose_and_repeat_nothing(config, digits, tmp_path):
    draw = random.Random(1)
    kills = sorted(draw.sample(range(5, STEPS - 5), 5))
    out = tmp_path / "out"

    def start(world: int, workers: int, out: Path = out) -> Command:
        return Command(world, ["--config", config, "--out", out, f"data.workers={workers}"], tmp_path / "said.txt")

    for world, kill in zip((1, 2, 4, 3, 1), kills, strict=True):
        command = start(world, draw.randint(1, 3))
        deadline = time.monotonic() + 600
        while steps_done(out) < kill and command.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert command.running, command.said
        command.kill()
        assert kill <= steps_done(out) < STEPS, command.said
    command = start(2, 2)
    assert command.wait() == [0], command.said

    order = Order(Index.open(digits / "train").samples, BATCH, seed=0)
    trained: dict[int, list[int]] = {step: [] for step in range(STEPS)}
    for path in sorted((out / "audit").glob("rank_?????.jsonl")):  # of as many ranks as trained each step
        for line in lines(path):
            trained[line["step"]] += line["ids"]
    assert trained == {step: order.ids(step).tolist() for step in range(STEPS)}
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == list(range(1, STEPS + 1))

    assert start(2, 1, tmp_path / "undisturbed").wait() == [0]
    losses, expected = (
        [line["loss"] for line in lines(folder / "metrics.jsonl")] for folder in (out, tmp_path / "undisturbed")
    )
    assert losses == pytest.approx(expected, rel=1e-5)
