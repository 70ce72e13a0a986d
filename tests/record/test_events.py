"""What happened to a run, written once, in its order, by one rank and one clock."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest
import torch

from pretrain.errors import DivergedError, InputError, StorageError
from pretrain.ranks.collectives import World
from pretrain.record import events
from pretrain.record.events import Events
from pretrain.record.folder import RunFolder
from tests.conftest import ROOT

ALONE = World(0, 1, 0, torch.device("cpu"))


def told(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_rank_0_alone_writes_a_line_for_each(tmp_path):
    with Events(RunFolder(tmp_path), World(1, 2, 1, torch.device("cpu"))) as of_rank_1:
        of_rank_1.add("saved", 3)
    assert not (tmp_path / "events.jsonl").exists()
    before = events.now()
    with Events(RunFolder(tmp_path), ALONE) as of_rank_0:
        of_rank_0.add("saved", 3, seconds=0.5)
        of_rank_0.add("skipped", 4, reason="the loss is nan")
    saved, skipped = told(tmp_path)
    assert before <= saved.pop("at") <= skipped.pop("at") <= events.now()
    assert saved == {"event": "saved", "step": 3, "seconds": 0.5}
    assert skipped == {"event": "skipped", "step": 4, "reason": "the loss is nan"}


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (InputError("no such shard"), "failed"),
        (DivergedError("the loss is nan"), "failed"),
        (ValueError("a defect"), "failed"),
        (KeyboardInterrupt(), "failed"),
        (StorageError("no answer"), "stopped"),
    ],
)
def test_the_last_event_names_what_ended_the_run_and_the_step(error, event, tmp_path):
    def fail():
        with Events(RunFolder(tmp_path), ALONE) as written:
            written.add("left", 7)
            raise error

    with pytest.raises(type(error)):
        fail()
    last = told(tmp_path)[-1]
    assert (last["event"], last["step"], last["reason"]) == (event, 7, f"{type(error).__name__}: {error}")


def test_no_resume_takes_an_event_back_but_a_torn_one_is_dropped(tmp_path):
    with Events(RunFolder(tmp_path), ALONE) as first:
        first.add("saved", 30)
    whole = (tmp_path / "events.jsonl").read_text()
    (tmp_path / "events.jsonl").write_text(whole + '{"at": 17')
    with Events(RunFolder(tmp_path), ALONE) as second:
        RunFolder(tmp_path).rewind(10)
        second.add("start", 10)
    assert [(line["event"], line["step"]) for line in told(tmp_path)] == [("saved", 30), ("start", 10)]


def test_a_full_disk_costs_no_event(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Events(RunFolder(tmp_path), ALONE) as written:
        written.add("train", 0)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60, limit[1]))
            written.add("saved", 10)
            written.add("unsaved", 20, reason="no room")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [line["event"] for line in told(tmp_path)] == ["train", "saved", "unsaved"]


def test_the_clock_of_a_process_goes_on_when_that_of_the_host_is_set_back(monkeypatch):
    before, real = events.now(), time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert 0 <= events.now() - before < 60


def test_a_process_knows_when_it_began_and_a_prompts_began_for_other_things(tmp_path):
    """The bounds hold however long a start of Python takes."""
    script = "import time; from pretrain.record.events import process_began; print(process_began(), time.time())"
    (tmp_path / "script.py").write_text(script)

    def began(*words) -> tuple[float, float, float]:
        command, before = [sys.executable, *words], time.time()
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
        return before, *map(float, done.stdout.split())

    before, began_at, after = began(tmp_path / "script.py")
    assert before - 0.02 <= began_at <= after - 0.1, "to 10 ms; importing torch alone takes longer than 0.1 s"
    before, began_at, after = began("-c", script)
    assert before + 0.1 <= began_at <= after + 0.001  # it is rounded to milliseconds


def test_without_proc_the_process_began_at_about_the_same_time(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    exact = events.process_began()
    monkeypatch.setattr(events, "Path", lambda name: tmp_path / "missing")
    assert abs(events.process_began() - exact) < 3  # psutil's time of booting is in whole seconds
