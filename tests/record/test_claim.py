"""A run folder is one run's at a time."""

import multiprocessing
import os
import signal
import socket
import threading
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event

import pytest
import torch

from pretrain.errors import InputError
from pretrain.ranks.collectives import World
from pretrain.record import claim

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
HERE, ELSEWHERE = socket.gethostname(), "node-z"


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the claim on `tmp_path`, as one of the host `host` does, until it is killed."""
    context = multiprocessing.get_context("fork")  # imports nothing anew
    holders = []

    def work(host: str, held: Event) -> None:
        claim.socket.gethostname = lambda: host
        with claim.claimed(tmp_path, ALONE):
            held.set()
            signal.pause()

    def hold(host: str) -> ForkProcess:
        held = context.Event()
        holder = context.Process(target=work, args=(host, held), daemon=True)
        holders.append(holder)
        holder.start()
        assert held.wait(300)
        return holder

    yield hold
    for holder in holders:
        holder.kill()
        holder.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(claim, "_ENDING", 0.2)
    monkeypatch.setattr(claim, "_LEASE", 1.0)


@pytest.mark.parametrize("host", [HERE, ELSEWHERE])
def test_a_second_run_is_refused_and_told_where_the_first_one_is(host, hold, tmp_path, capsys):
    """Status 2, on whatever host: with 75 a job script would start the same command for as long as the other lasts."""
    holder = hold(host)
    with pytest.raises(InputError) as refused, claim.claimed(tmp_path, ALONE):
        pass
    assert type(refused.value) is InputError
    assert (f"waiting 1 s, in case {host} is lost" in capsys.readouterr().out) == (host == ELSEWHERE)
    assert f"a run is under way in it (rank 0 is process {holder.pid} on {host}); wait for it" in str(refused.value)
    lost = f"if {host} is lost for good, remove {tmp_path}/.claim"
    assert (lost in str(refused.value)) == (host == ELSEWHERE)


def test_the_lock_of_a_lost_host_is_waited_for(hold, tmp_path, monkeypatch):
    """A file system releases it after a while, as the kernel does that of the process killed here."""
    monkeypatch.setattr(claim, "_LEASE", 300.0)
    lost = threading.Timer(1.0, hold(ELSEWHERE).kill)
    lost.start()
    with claim.claimed(tmp_path, ALONE):
        assert (tmp_path / ".claim").read_text() == f"rank 0 is process {os.getpid()} on {HERE}\n"
    lost.join()


def test_a_run_of_an_earlier_version_on_this_host_is_one_of_this_host(hold, tmp_path):
    holder = hold(HERE)
    (tmp_path / ".claim").write_text(f"rank 0 is process {holder.pid} on {HERE}, boot 0a1b2c3d\n")
    with pytest.raises(InputError) as refused, claim.claimed(tmp_path, ALONE):
        pass
    assert type(refused.value) is InputError


def test_a_run_that_was_killed_holds_nothing(hold, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_ENDING", 60.0)
    hold(HERE).kill()  # a moment before: the second run waits for it
    with claim.claimed(tmp_path, ALONE):
        assert (tmp_path / ".claim").read_text() == f"rank 0 is process {os.getpid()} on {HERE}\n"


def test_a_claim_that_was_removed_by_hand_is_no_claim(hold, tmp_path):
    hold(ELSEWHERE)
    (tmp_path / ".claim").unlink()
    with claim.claimed(tmp_path, ALONE):
        pass


def test_where_files_cannot_be_locked_a_run_starts_and_says_so(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claim.fcntl, "lockf", no_locks)
    with claim.claimed(tmp_path, ALONE):
        pass
    assert "Operation not supported; nothing keeps a second run out" in capsys.readouterr().out
