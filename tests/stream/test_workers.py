"""Work spread over processes: nothing of it outlives the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import sys, time
from pathlib import Path
from pretrain.stream.workers import map_shards

def work(job, stop):
    Path(sys.argv[1], str(__import__("os").getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    list(map_shards(work, list(range(8)), doing="waiting", workers=2))
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_command_that_is_killed_leaves_no_process(tmp_path):
    script, seen = tmp_path / "command.py", tmp_path / "seen"
    script.write_text(COMMAND)
    seen.mkdir()
    process = subprocess.Popen(
        [sys.executable, script, seen], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    patience = time.monotonic() + 60
    while len(pids := [int(path.name) for path in seen.iterdir()]) < 2 and time.monotonic() < patience:
        time.sleep(0.1)
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    process.send_signal(signal.SIGKILL)
    process.wait()
    patience = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
