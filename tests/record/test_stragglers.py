"""The slowest rank is named, with the part in which it is slow, in metrics.jsonl and on the console."""

import json
import math
import socket
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.engine.step import Update
from pretrain.ranks.collectives import World
from pretrain.record import pulse as stragglers
from pretrain.record.folder import RunFolder
from pretrain.record.metrics import Metrics, Straggler, Workload, slowest
from pretrain.record.pulse import Pulse, Stopwatch
from pretrain.record.section import LoggingSection
from pretrain.stream.counters import Counters


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([(0.0, 1.0), (0.0, 1.5), (0.0, 1.0)], Straggler(1, "forward", 1.5)),
        ([(0.0, 1.0), (0.1, 1.0), (1.0, 1.0), (0.0, 1.0)], Straggler(2, "data", 2.0)),
        ([(0.5, 1.0), (0.7, 1.4)], Straggler(1, "forward", 1.4)),  # slow in both: the part that costs more
        ([(0.5, 1.0), (1.9, 1.1)], Straggler(1, "data", 2.0)),
        ([(0.0, 1.0), (0.0, 1.0)], Straggler(0, "forward", 1.0)),
        ([(5.0, 1.0), (5.0, 1.0), (5.0, 1.6)], Straggler(2, "forward", 1.1)),  # all wait alike for the data
    ],
)
def test_the_slowest_rank_is_measured_by_the_median_one(times, found):
    got = slowest(times)
    assert (got.rank, got.part) == (found.rank, found.part) or found.excess == 1
    assert got.excess == pytest.approx(found.excess)


def test_a_run_names_its_slow_rank_host_and_part(ranks, tmp_path):
    ranks(2, Path(__file__).parent / "slow_rank.py", tmp_path)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    host = socket.gethostname()
    keys = ("straggler/rank", "straggler/host", "straggler/part")
    assert [first[key] for key in keys] == [1, host, "forward"]
    assert 1.5 < first["straggler/excess"] < 3  # 1.1 s over 0.5 s
    assert [second[key] for key in keys] == [0, host, "data"]
    assert 1.4 < second["straggler/excess"] < 2.5  # 0.9 s over 0.5 s
    assert first["data_wait"] < 0.4 < second["data_wait"] < 0.9  # 0.2 s of 1.1 s, then 0.6 s of 0.9 s
    assert (tmp_path / "tensorboard").is_dir()


ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def metrics(tmp_path):
    workload = Workload(steps=9, global_batch=8, samples=80, flops_per_image=1, peak_flops=1.0)
    metrics = Metrics(RunFolder(tmp_path), ALONE, LoggingSection(every=1), workload, Counters(), start=4, skipped=2)
    metrics.step = partial(metrics.step, pulse=Pulse(SimpleNamespace(), ALONE.device))
    yield metrics
    metrics.close()


def test_skipped_updates_are_counted_over_resumes_and_a_step_without_numbers_is_logged(metrics, tmp_path, capsys):
    metrics.step(5, math.nan, Update(0.1, math.inf, "the loss is nan"))
    metrics.step(6, 1.0, Update(0.1, 2.0, None))
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["loss"], first["grad_norm"], first["updates_skipped"]) == (None, None, 3)
    assert (second["loss"], second["updates_skipped"]) == (1.0, 3)
    assert "3 updates skipped" in capsys.readouterr().out
    assert not any(key.startswith("straggler") for key in first)  # nobody to compare with


def test_a_slow_rank_is_on_the_progress_line_when_it_is_much_slower(metrics, capsys):
    shared = {"data_wait": 0.0, "straggler/rank": 3, "straggler/host": "node-b", "straggler/part": "forward"}
    for excess, said in ((1.1, False), (1.34, True)):
        metrics._gather = lambda *_, excess=excess: {**shared, "straggler/excess": excess}
        metrics.step(5, 1.0, Update(0.1, 2.0, None))
        assert ("rank 3 (node-b) is slow: forward ×1.34" in capsys.readouterr().out) == said


def test_on_an_accelerator_its_own_marks_are_read_at_the_end_of_a_window(monkeypatch):
    waited = []

    class Event:
        """A mark of a device that is 100 ms behind the host."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter() + 0.1

        def synchronize(self):
            waited.append(self)
            time.sleep(max(0.0, self.at - time.perf_counter()))

        def elapsed_time(self, other):
            assert time.perf_counter() >= other.at, "asked before the device came so far"
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(stragglers, "get_accelerator", lambda: type("Accelerator", (), {"Event": Event}))
    watch, begun = Stopwatch(torch.device("cuda")), time.perf_counter()
    for _ in range(3):
        with watch.running():
            time.sleep(0.02)
    spent = time.perf_counter() - begun
    assert not waited
    assert 0.06 <= watch.take() <= spent
    assert len(waited) == 1
    assert watch.take() == 0
