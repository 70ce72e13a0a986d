"""A run folder is one run's at a time."""

import multiprocessing
import os
import signal
import socket
import threading
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from types import SimpleNamespace

import pytest
import torch

from pretrain.errors import InputError, StorageError
from pretrain.ranks.collectives import World
from pretrain.ranks.command import STOPPED
from pretrain.record import claim
from pretrain.training import experiment

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
    monkeypatch.setattr(claim, "_PATIENCE", 0.5)
    monkeypatch.setattr(claim, "_ELSEWHERE", 1.5)


@pytest.mark.parametrize(("host", "kind"), [(HERE, InputError), (ELSEWHERE, StorageError)])
def test_a_second_run_is_refused_and_told_where_the_first_one_is(host, kind, hold, tmp_path):
    holder = hold(host)
    with pytest.raises(InputError) as refused, claim.claimed(tmp_path, ALONE):
        pass
    assert type(refused.value) is kind
    assert f"a run is under way in it (rank 0 is process {holder.pid} on {host}); wait for it" in str(refused.value)
    lost = f"if {host} is lost for good, remove {tmp_path}/.claim"
    assert (lost in str(refused.value)) == (host == ELSEWHERE)


def test_a_run_on_another_host_that_logs_steps_is_refused_for_good(hold, tmp_path):
    """Status 2: a job script would start the same command again and again while the other run goes on for months."""
    hold(ELSEWHERE)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}\n")
    log = threading.Timer(0.9, lambda: metrics.write_text("{}\n{}\n"))
    log.start()
    with pytest.raises(InputError) as refused, claim.claimed(tmp_path, ALONE):
        pass
    log.join()
    assert type(refused.value) is InputError


def test_a_run_of_an_earlier_version_on_this_host_is_one_of_this_host(hold, tmp_path):
    holder = hold(HERE)
    (tmp_path / ".claim").write_text(f"rank 0 is process {holder.pid} on {HERE}, boot 0a1b2c3d\n")
    with pytest.raises(InputError) as refused, claim.claimed(tmp_path, ALONE):
        pass
    assert type(refused.value) is InputError


def test_a_run_that_was_killed_holds_nothing(hold, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_PATIENCE", 10.0)
    hold(HERE).kill()  # a moment before: the second run waits for it
    with claim.claimed(tmp_path, ALONE):
        assert (tmp_path / ".claim").read_text() == f"rank 0 is process {os.getpid()} on {HERE}\n"


def test_a_claim_that_was_removed_by_hand_is_no_claim(hold, tmp_path):
    hold(ELSEWHERE)
    (tmp_path / ".claim").unlink()
    with claim.claimed(tmp_path, ALONE):
        pass


@pytest.mark.parametrize("begun", [True, False])
def test_another_hosts_claim_is_a_reason_to_try_again_where_there_is_a_checkpoint(
    begun, hold, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(experiment, "beginning", lambda *_, needed: (None, None))
    monkeypatch.setattr(experiment, "prepare", lambda *_: None)
    hold(ELSEWHERE)
    if begun:
        (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
        assert experiment.run(SimpleNamespace(needs_weights=False), tmp_path, ALONE, fill=None) == STOPPED
        assert f"if {ELSEWHERE} is lost for good, remove {tmp_path}/.claim" in capsys.readouterr().out
    else:
        with pytest.raises(StorageError, match=r"a run is under way in it \(rank 0 is process"):
            experiment.run(SimpleNamespace(needs_weights=False), tmp_path, ALONE, fill=None)


def test_where_files_cannot_be_locked_a_run_starts_and_says_so(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claim.fcntl, "lockf", no_locks)
    with claim.claimed(tmp_path, ALONE):
        pass
    assert "Operation not supported; nothing keeps a second run out" in capsys.readouterr().out
