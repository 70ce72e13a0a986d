"""Work spread over processes: nothing of it outlives the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = """
import sys, time
from pathlib import Path
from pretrain.errors import InputError
from pretrain.workers import map_shards

def work(job, stop):
    Path(sys.argv[1], str(__import__("os").getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    try:
        list(map_shards(work, list(range(8)), doing="waiting", workers=2))
    except InputError as error:
        print(error)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pids: list[int]) -> bool:
    patience = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < patience:
        time.sleep(0.1)
    return not any(alive(pid) for pid in pids)


@pytest.fixture
def begun(tmp_path):
    """A command under way, and the ids of its two worker processes."""
    script, seen = tmp_path / "command.py", tmp_path / "seen"
    script.write_text(COMMAND)
    seen.mkdir()
    process = subprocess.Popen(
        [sys.executable, script, seen],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    patience = time.monotonic() + 60
    while len(pids := [int(path.name) for path in seen.iterdir()]) < 2 and time.monotonic() < patience:
        time.sleep(0.1)
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    yield process, pids
    process.kill()
    process.communicate()


def test_a_command_that_is_killed_leaves_no_process(begun):
    process, pids = begun
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(pids)


def test_a_worker_process_that_is_killed_ends_the_command_with_a_word(begun):
    process, pids = begun
    os.kill(pids[0], signal.SIGKILL)
    said = process.communicate(timeout=300)[0].decode()
    assert said.startswith("one of 2 worker processes was killed"), said
    assert gone(pids)
