"""A run folder is one run's at a time."""

import subprocess
import sys

import pytest
import torch

from pretrain.engine.distributed import World
from pretrain.errors import InputError
from pretrain.run import claim

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
HOLD = """
import sys, torch
from pathlib import Path
from pretrain.engine.distributed import World
from pretrain.run.claim import claimed
with claimed(Path(sys.argv[1]), World(0, 1, 0, torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_told_where_the_first_one_is(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "_PATIENCE", 0.5)
    said = rf"a run is under way in it \(rank 0 is process {holder.pid} on "
    with pytest.raises(InputError, match=said), claim.claimed(tmp_path, ALONE):
        pass


def test_a_run_that_was_killed_holds_nothing(holder, tmp_path):
    holder.kill()  # a moment before: the second run waits for it
    with claim.claimed(tmp_path, ALONE):
        pass


def test_where_files_cannot_be_locked_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claim.fcntl, "lockf", no_locks)
    with claim.claimed(tmp_path, ALONE):
        pass
    assert "Operation not supported; nothing keeps a second run out" in capsys.readouterr().out
