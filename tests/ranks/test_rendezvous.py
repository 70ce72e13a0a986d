"""While ranks wait for one another, each host says for which and where."""

import os
import re
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.started import Forked
from pretrain.ranks import rendezvous
from pretrain.ranks.launcher import free_port
from pretrain.ranks.rendezvous import announced, ranks_text

ROOT = Path(__file__).resolve().parents[2]


def place(rank: int, port: int, local_rank: int = 0, size: int = 4) -> dict[str, str]:
    told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "MASTER_PORT": port}
    return {**{name: str(value) for name, value in told.items()}, "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def said(capsys):
    """What stands on stderr once `words` are among it, or after a while."""

    def said(words: str, patience: float = 30) -> str:
        told, until = "", time.monotonic() + patience
        while words not in told and time.monotonic() < until:
            time.sleep(0.02)
            told += capsys.readouterr().err
        return told

    return said


def store(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


def test_it_is_told_how_many_ranks_are_missing_which_and_where(said):
    port = free_port()
    kept = store(port)
    with announced(place(0, port), 0.05), announced(place(2, port, local_rank=1), 0.05):
        told = said(": ranks 1, 3;")
    assert (
        f"rank 0 ({socket.gethostname()}): waiting 0 s for 2 of 4 ranks to meet at 127.0.0.1:{port}: ranks 1, 3;"
        in told
    )
    assert "rank 2 (" not in told, "one line for each host"
    del kept


def test_ranks_that_cannot_reach_the_first_say_so_and_why(said):
    port = free_port()
    with announced(place(3, port), 0.05):
        told = said("rank 0 to answer")
    assert f"for rank 0 to answer at 127.0.0.1:{port}: Connection refused; is it started" in told


def test_ranks_that_have_all_come_wait_for_their_connections(said):
    port = free_port()
    kept = store(port)
    with announced(place(0, port, size=2), 0.05), announced(place(1, port, size=2), 0.05):
        assert f"for all 2 ranks, which have met at 127.0.0.1:{port}, to connect with one another" in said("have met")
    del kept


def test_ranks_that_meet_soon_say_nothing(said):
    with announced(place(0, free_port())):
        pass
    assert said("waiting", patience=0.1) == ""


def test_the_pauses_grow(said, monkeypatch):
    monkeypatch.setattr(rendezvous, "_LONGEST", 0.3)
    with announced(place(0, free_port()), 0.1):
        told = said("never", patience=1.6)
    assert 2 <= told.count("waiting") <= 6, "after 0.1, 0.3, 0.6, … s, not every 0.1 s"


START = """
from functools import partial
from pretrain.engine import processgroup
from pretrain.ranks import rendezvous
from pretrain.ranks.command import run_command
processgroup.announced = partial(rendezvous.announced, first=0.2)
run_command(lambda: processgroup.start(meet_minutes=%s))
"""


def test_a_run_of_which_one_rank_of_four_is_started_says_what_it_waits_for_and_at_last_ends(tmp_path):
    port, script = free_port(), tmp_path / "start.py"
    script.write_text(START % (3 / 60))
    environment = {**os.environ, **place(0, port), "DS_ACCELERATOR": "cpu"}
    rank = Forked(1, [], tmp_path / "said.txt", script=script, environment=environment)
    assert rank.wait() == [2], rank.said
    assert "for 3 of 4 ranks to meet at" in rank.said
    assert re.search(rf"error: 127\.0\.0\.1:{port}, where 4 ranks meet: .*1/4 clients joined", rank.said)
    assert "Traceback" not in rank.said


def test_many_ranks_are_named_in_few_words():
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
