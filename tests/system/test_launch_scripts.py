"""launch/slurm.sbatch and launch/ssh.sh: when they start again, on which nodes, and when they give up.

The commands they call are stand-ins: `srun` and `deepspeed` end with the next status of a list, `ssh` reaches whoever
is not listed as dead. test_nodes.py runs the real ones.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
# Ends as `statuses` says, one word a start: a status, and "+" where the start writes a checkpoint.
ENDS = """#!/bin/bash
[[ $* =~ --hostfile\\ ([^ ]*) ]] && paste -sd' ' "${BASH_REMATCH[1]}" >>nodes
n=$(cat starts 2>/dev/null || echo 0); echo $((n + 1)) >starts
words=($(cat statuses)); word=${words[$n]}
if [ "$word" = wait ]; then while [ ! -e run/STOP ]; do /bin/sleep 0.05; done; exit 75; fi
if [[ $word == *+ ]]; then mkdir -p run/checkpoints; echo "step_$n" >run/checkpoints/latest; fi
exit "${word%+}"
"""
STAND_INS = {
    "srun": ENDS,
    "deepspeed": ENDS,
    "ssh": '#!/bin/bash\nfor host in $(cat dead); do [[ " $* " == *" $host "* ]] && exit 255; done; exit 0\n',
    "scontrol": '#!/bin/sh\necho "$@" >>scontrol.log\n',
    "sleep": "#!/bin/sh\n",
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "dead").write_text("")
    (tmp_path / "hosts").write_text("# the cluster\nnode-a slots=8\n\nnode-b slots=8\nnode-c slots=8\n")
    return tmp_path


def start(place: Path, script: str, *words: str, statuses: str) -> subprocess.Popen:
    (place / "statuses").write_text(statuses)
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    environment.update(SLURM_SUBMIT_DIR=str(place), SLURM_JOB_ID="7")
    return subprocess.Popen(
        ["bash", LAUNCH / script, *words],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # bash cannot trap what it was begun ignoring
    )


@pytest.mark.parametrize(
    ("statuses", "ends", "requeued"),
    [("0", 0, False), ("2", 2, False), ("75", 0, True), ("138", 0, True), ("1+", 0, True), ("1", 1, False)],
)
def test_the_slurm_job_requeues_itself_where_another_start_would_help(statuses, ends, requeued, place):
    job = start(place, "slurm.sbatch", "run", "--config", "h14.json", statuses=statuses)
    said = job.communicate(timeout=30)[0]
    assert job.returncode == ends, said
    assert (place / "scontrol.log").exists() == requeued
    if requeued:
        assert (place / "scontrol.log").read_text() == "requeue 7\n"


ALL, AB, A = "node-a slots=8 node-b slots=8 node-c slots=8", "node-a slots=8 node-b slots=8", "node-a slots=8"


@pytest.mark.parametrize(
    ("dead", "statuses", "ends", "nodes"),
    [
        ("", "0", 0, [ALL]),
        ("", "2", 2, [ALL]),  # nothing is missing, so the input is at fault
        ("", "75 255+ 0", 0, [ALL] * 3),
        ("node-c", "2 0", 0, [AB, A]),  # the batch does not divide among two
        ("node-c", "2 2", 2, [AB, A]),
        ("node-b node-c", "0", 0, [A]),
        ("node-a node-b node-c", "0", 1, []),
        ("", "1 1 1 0", 1, [ALL] * 3),  # three starts in a row without a checkpoint
        ("", "1 1 1+ 1 1 0", 0, [ALL] * 6),
    ],
)
def test_over_ssh_the_run_goes_on_with_the_nodes_that_answer(dead, statuses, ends, nodes, place):
    (place / "dead").write_text(dead)
    job = start(place, "ssh.sh", "hosts", "run", "--config", "h14.json", statuses=statuses)
    said = job.communicate(timeout=30)[0]
    assert job.returncode == ends, said
    started = (place / "nodes").read_text().splitlines() if (place / "nodes").exists() else []
    assert started == nodes, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_over_ssh_a_signal_is_a_stop_and_the_end(number, place):
    job = start(place, "ssh.sh", "hosts", "run", "--config", "h14.json", statuses="wait 0")
    deadline = time.monotonic() + 30
    while not (place / "starts").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(number)
    said = job.communicate(timeout=30)[0]
    assert job.returncode == 75, said
    assert (place / "starts").read_text() == "1\n"
