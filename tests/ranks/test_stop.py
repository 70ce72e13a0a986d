"""Every way to ask a run for a stop, with real signals to real processes."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
def waiting():
    """Start a rank that waits to be asked; returns once it does."""
    started = []

    def waiting(folder, rank=0, *minutes):
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "stops.py"), str(folder), str(rank), *map(str, minutes)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield waiting
    for process in started:
        process.kill()


def test_any_signal_to_any_rank_is_noted_and_a_second_ctrl_c_ends_it_at_once(waiting, tmp_path):
    asked = [(signal.SIGTERM, 0), (signal.SIGUSR1, 1), (signal.SIGINT, 1), (signal.SIGINT, 0)]
    ranks = [(number, waiting(tmp_path, rank)) for number, rank in asked]
    for number, process in ranks:
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
    *_, (_, twice) = ranks
    twice.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in twice.communicate(timeout=30)[1]
    assert [process.wait(timeout=30) for _, process in ranks] == [75, 75, 75, -signal.SIGINT]


def test_repeated_signals_of_other_kinds_do_not_disturb_the_save(waiting, tmp_path):
    process = waiting(tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"  # as the DeepSpeed launcher's SIGTERM follows a Ctrl-C
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 75


def test_the_file_is_seen_by_rank_0_and_taken_away_when_the_stop_is_done(waiting, tmp_path):
    main, other = waiting(tmp_path), waiting(tmp_path, 1)
    (tmp_path / "STOP").touch()
    assert main.communicate(timeout=30)[0] == f"{tmp_path / 'STOP'} exists\n"
    assert main.returncode == 75
    assert not (tmp_path / "STOP").exists()
    assert other.poll() is None  # it is told by rank 0, in a collective of the loop


def test_a_file_system_that_does_not_answer_for_now_asks_for_nothing(tmp_path, monkeypatch):
    def stale(*args, **options):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    stop = Stop(tmp_path, World(0, 1, 0, torch.device("cpu")))
    with monkeypatch.context() as away:
        away.setattr(os, "stat", stale)
        assert not stop.asked()
    (tmp_path / "STOP").touch()
    assert stop.asked()


def test_the_time_limit_is_rank_0s_clock(waiting, tmp_path):
    process = waiting(tmp_path, 0, 0.01)
    assert process.communicate(timeout=30)[0] == "train.time_limit_minutes is reached\n"
    assert process.returncode == 75
