"""The ranks of a host take turns at compiling DeepSpeed's op."""

import fcntl
import threading

import pytest

from pretrain.engine import processgroup


@pytest.mark.parametrize("announce", [True, False])
def test_a_rank_that_waits_long_for_its_turn_says_for_which_lock(announce, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processgroup, "_TURN", 0.1)
    path, waited = tmp_path / "vit_foundry.lock", threading.Event()
    with path.open("w") as held, path.open("w") as turn:
        fcntl.flock(held, fcntl.LOCK_EX)
        rank = threading.Thread(target=lambda: (processgroup._take_turn(turn, announce), waited.set()))
        rank.start()
        assert not waited.wait(0.5)
        fcntl.flock(held, fcntl.LOCK_UN)
        assert waited.wait(60)
        rank.join()
    said = capsys.readouterr().err
    assert said.count("waiting for another process to compile") == announce
    assert (f"({path} is locked)" in said) == announce
