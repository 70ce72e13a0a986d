"""A run folder is one run's at a time."""

import multiprocessing
import os
import signal
import socket
import threading
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.errors import InputError, StorageError
from pretrain.ranks.collectives import World
from pretrain.record import claim
from pretrain.run import experiment
from pretrain.run.command import STOPPED

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
HERE, LOST = socket.gethostname(), "node-z"


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
        assert held.wait(30)
        return holder

    yield hold
    for holder in holders:
        holder.kill()
        holder.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(claim, "_PATIENCE", 0.5)
    monkeypatch.setattr(claim, "_LEASE", 2.0)


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as refused, claim.claimed(folder, ALONE):
        pass
    return refused.value


def test_a_second_run_is_refused_and_told_where_the_first_one_is(hold, tmp_path, capsys):
    holder, refused = hold(HERE), refusal(tmp_path)
    assert f"a run is under way in it (rank 0 is process {holder.pid} on {HERE}, boot " in str(refused)
    assert type(refused) is InputError
    assert capsys.readouterr().out == "", "it has not waited for what will not come"


def test_a_second_run_is_refused_at_once_also_where_another_of_its_ranks_is_on_the_host_of_the_first(
    hold, tmp_path, monkeypatch, capsys
):
    hold(LOST)
    monkeypatch.setattr(claim, "all_gather_list", lambda alive: [*alive, True])
    assert type(refusal(tmp_path)) is InputError
    assert capsys.readouterr().out == ""


def test_a_run_that_was_killed_holds_nothing(hold, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_PATIENCE", 10.0)
    hold(HERE).kill()  # a moment before: the second run waits for it
    with claim.claimed(tmp_path, ALONE):
        pass


def test_the_lock_of_a_host_that_is_not_heard_of_is_waited_for_and_that_is_said(hold, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claim, "_LEASE", 60.0)
    holder = hold(LOST)
    timer = threading.Timer(1.5, holder.kill)  # as a file system does whose lease has run out
    timer.start()
    with claim.claimed(tmp_path, ALONE):
        mine = (tmp_path / ".claim").read_text()
    timer.join()
    assert mine.startswith(f"rank 0 is process {os.getpid()} on {HERE}, boot ")
    said = capsys.readouterr().out
    assert f"no host of this run knows (rank 0 is process {holder.pid} on {LOST}, boot " in said
    assert "waiting for that, 1 minutes at most" in said


def test_a_host_that_came_back_does_not_hold_what_it_held_before(hold, tmp_path, monkeypatch):
    hold(HERE)  # a process of that number is alive, as one may be after the host was started anew
    (tmp_path / "boot_id").write_text("another-boot")
    monkeypatch.setattr(claim, "_BOOT", tmp_path / "boot_id")
    assert type(refusal(tmp_path)) is StorageError


def test_a_run_elsewhere_whose_metrics_grow_is_under_way(hold, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_LEASE", 60.0)
    hold(LOST)
    timer = threading.Timer(1.5, lambda: (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n'))
    timer.start()
    refused = refusal(tmp_path)
    timer.join()
    assert type(refused) is InputError
    assert "a run is under way in it" in str(refused)


@pytest.mark.parametrize("begun", [True, False])
def test_a_lock_that_is_not_given_up_is_a_reason_to_try_again_where_there_is_a_checkpoint(
    begun, hold, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(experiment, "beginning", lambda *_, needed: (None, None))
    monkeypatch.setattr(experiment, "prepare", lambda *_: None)
    hold(LOST)
    if begun:
        (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
        assert experiment.run(SimpleNamespace(needs_weights=False), tmp_path, ALONE, fill=None) == STOPPED
        assert f"if it is gone for good, remove {tmp_path}/.claim" in capsys.readouterr().out
    else:
        with pytest.raises(StorageError, match=r"a run that is not heard of holds its lock \(rank 0 is process"):
            experiment.run(SimpleNamespace(needs_weights=False), tmp_path, ALONE, fill=None)


def test_where_files_cannot_be_locked_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claim.fcntl, "lockf", no_locks)
    with claim.claimed(tmp_path, ALONE):
        pass
    assert "Operation not supported; nothing keeps a second run out" in capsys.readouterr().out
