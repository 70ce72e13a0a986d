"""Every way to ask a run for a stop, with real signals to real processes."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.started import Forked
from pretrain.ranks.collectives import World
from pretrain.ranks.stop import Stop

ROOT = Path(__file__).resolve().parents[2]


EARLY = """
import os, signal, sys
from pretrain.ranks.stop import Stop, listen
if sys.argv[1:]:
    listen()
assert "torch" not in sys.modules
os.kill(os.getpid(), signal.SIGUSR1)
from pathlib import Path
import torch
from pretrain.ranks.collectives import World
print(Stop(Path(), World(0, 1, 0, torch.device("cpu"))).asked())
"""


@pytest.mark.parametrize(("words", "said", "status"), [(["listen"], "True\n", 0), ([], "", -signal.SIGUSR1)])
def test_a_signal_before_the_end_of_a_job_is_heard_while_a_rank_is_starting(words, said, status):
    done = subprocess.run(
        [sys.executable, "-c", EARLY, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == (said, status), done.stderr


@pytest.fixture
def waiting(tmp_path):
    """Start a rank that waits to be asked; returns once it does."""
    started = []

    def waiting(folder, rank=0, *minutes):
        log = tmp_path / f"said{len(started)}.txt"
        started.append(Forked(1, [folder, rank, *minutes], log, script=Path(__file__).with_name("stops.py")))
        says(started[-1], "ready\n")
        return started[-1]

    yield waiting
    for rank in started:
        rank.kill()


def says(rank: Forked, words: str) -> None:
    """Wait until the rank has said `words`, and nothing else."""
    deadline = time.monotonic() + 600
    while len(rank.said) < len(words) and rank.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert rank.said == words


def test_any_signal_to_any_rank_is_noted_and_a_second_ctrl_c_ends_it_at_once(waiting, tmp_path):
    asked = [(signal.SIGTERM, 0), (signal.SIGUSR1, 1), (signal.SIGINT, 1), (signal.SIGINT, 0)]
    ranks = [(number, waiting(tmp_path, rank)) for number, rank in asked]
    for number, rank in ranks:
        rank.send(number)
        says(rank, f"ready\n{number.name}\n")
    *_, (_, twice) = ranks
    twice.send(signal.SIGINT)
    assert [rank.wait() for _, rank in ranks] == [[75], [75], [75], [1]]
    assert "KeyboardInterrupt" in twice.said


def test_repeated_signals_of_other_kinds_do_not_disturb_the_save(waiting, tmp_path):
    rank = waiting(tmp_path, 1)
    rank.send(signal.SIGINT)
    says(rank, "ready\nSIGINT\n")  # as the DeepSpeed launcher's SIGTERM follows a Ctrl-C
    rank.send(signal.SIGTERM)
    rank.send(signal.SIGUSR1)
    assert rank.wait() == [75]


def test_the_file_is_seen_by_rank_0_and_taken_away_when_the_stop_is_done(waiting, tmp_path):
    main, other = waiting(tmp_path), waiting(tmp_path, 1)
    (tmp_path / "STOP").touch()
    assert main.wait() == [75]
    assert main.said == f"ready\n{tmp_path / 'STOP'} exists\n"
    assert not (tmp_path / "STOP").exists()
    assert other.running  # it is told by rank 0, in a collective of the loop


def test_a_file_system_that_does_not_answer_for_now_asks_for_nothing(tmp_path, monkeypatch):
    def stale(*args, **options):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    stop = Stop(tmp_path, World(0, 1, 0, torch.device("cpu")))
    with monkeypatch.context() as away:
        away.setattr(os, "stat", stale)
        assert not stop.asked()
    (tmp_path / "STOP").touch()
    assert stop.asked()


def test_a_run_that_is_one_of_several_is_stopped_by_its_own_folder_and_by_theirs(tmp_path):
    stop = Stop(tmp_path, World(0, 1, 0, torch.device("cpu")))
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        stop.enter(tmp_path / run)
    (tmp_path / "one/STOP").touch()
    assert not stop.asked(), "that run is over"
    (tmp_path / "two/STOP").touch()
    (tmp_path / "STOP").touch()
    assert stop.asked()
    stop.done()
    assert not (tmp_path / "two/STOP").exists()
    assert not (tmp_path / "STOP").exists()


def test_the_time_limit_is_rank_0s_clock(waiting, tmp_path):
    rank = waiting(tmp_path, 0, 0.01)
    assert rank.wait() == [75]
    assert rank.said == "ready\ntrain.time_limit_minutes is reached\n"
