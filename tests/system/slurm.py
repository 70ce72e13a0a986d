"""A Slurm of one node on this machine: munge, controller and node daemon as the system's packages install them.

    with cluster(tmp_path) as slurm:
        job = slurm.submit("--time=2", "launch/slurm.sbatch", "runs/trial", …)
        slurm.wait(job, "COMPLETED")

Its files are in the folder, its ports are free ones. The daemons, and all that their jobs start, live in a PID
namespace of a child process and go with it, however the test ends. Jobs see the node under the name `localhost`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pretrain.ranks.launcher import free_port

ROOT = Path(__file__).resolve().parents[2]
GPUS = 2  # of a node that has none: empty files in the place of devices, which Slurm counts and gives out
PACKAGES = {
    "munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "unshare": "util-linux",
}  # fmt: skip

CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
FirstJobId={first_job}
GresTypes=gpu
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:{gpus}
PartitionName=all Nodes=localhost Default=YES
"""
BOOT = """
munged --foreground --force --socket=munge.socket --key-file=munge.key --log-file=munged.log --pid-file=munged.pid \
  --seed-file=munged.seed --num-threads=10 &
while ! [ -S munge.socket ]; do sleep 0.05; done
slurmctld -D >slurmctld.log 2>&1 &
slurmd -D -N localhost >slurmd.log 2>&1 &
wait
"""
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons start jobs in a namespace of their own: needs root"
    for command, package in PACKAGES.items():
        if shutil.which(command, path=_PATH) is None:
            return f"needs the command {command} (Debian: {package})"
    tried = subprocess.run([*_alone(), "true"], capture_output=True, text=True)
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None


class Slurm:
    """A running cluster. `checkout` is a folder like the repository's root, from which jobs are submitted."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.checkout, self._environment = folder, folder / "checkout", environment

    def run(self, *words: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command of Slurm's, from the checkout; status and both outputs."""
        environment = {**os.environ, **self._environment}
        words = tuple(map(str, words))
        return subprocess.run(
            words, cwd=self.checkout, env=environment, capture_output=True, text=True, timeout=timeout
        )

    def submit(self, *words: object) -> str:
        """`sbatch words`: the number of the job."""
        done = self.run("sbatch", "--parsable", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, Reason …"""
        said = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(field.split("=", 1) for field in said.split() if "=" in field)

    def said(self, number: str) -> str:
        """The job's output up to now, of all its starts."""
        output = self.checkout / f"slurm-{number}.out"
        return output.read_text(errors="replace") if output.exists() else ""

    def until(self, number: str, holds: Callable[[], bool], what: str, seconds: float = 600) -> None:
        """Wait until `holds()` is true; the job must not end before."""
        deadline = time.monotonic() + seconds
        while not holds():
            state = self.job(number)["JobState"]
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), self.why(number, f"before {what}")
            assert time.monotonic() < deadline, self.why(number, f"waited {seconds} s for {what}")
            time.sleep(0.2)

    def wait(self, number: str, state: str, seconds: float = 600) -> dict[str, str]:
        """Wait until the job is over; it must have ended in this state."""
        ended = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
        deadline = time.monotonic() + seconds
        while (now := self.job(number))["JobState"] not in ended:
            assert time.monotonic() < deadline, self.why(number, f"not {state} within {seconds} s")
            time.sleep(0.2)
        assert now["JobState"] == state, self.why(number, f"not {state}")
        return now

    def idle(self) -> bool:
        """Whether the node is free of jobs, those that are just ending too."""
        return self.run("sinfo", "--noheader", "--format=%t").stdout.split() == ["idle"]

    def why(self, number: str, what: str) -> str:
        """For a failed assertion: what was expected, the job, and what it said."""
        logs = "".join((self.folder / f"{name}.log").read_text()[-2000:] for name in ("slurmctld", "slurmd"))
        return f"{what}\n{self.job(number)}\n{self.said(number)}\n{logs}"


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """A cluster of one node that accepts jobs; at the end of the block nothing of it runs any more."""
    for name in ("state", "spool", "checkout/.venv/bin"):
        (folder / name).mkdir(parents=True)
    (folder / "checkout" / "launch").symlink_to(ROOT / "launch")
    python = (
        folder / "checkout" / ".venv" / "bin" / "python"
    )  # no link: DeepSpeed's ops are compiled again for each path
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "munge.key").write_bytes(random.randbytes(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    # Jobs' ranks meet at port 20000 + job number.
    ports = {"controller": free_port(), "node": free_port(), "first_job": random.randrange(1, 9900)}
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, gpus=GPUS, **ports))
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")

    place = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": _PATH, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(folder / "boot.log", "w") as log:
        boot = subprocess.Popen(
            [*_alone(), "sh", "-euc", BOOT],
            cwd=folder, env={**os.environ, **place}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    slurm = Slurm(folder, place)
    try:
        deadline = time.monotonic() + 60
        while not slurm.idle():
            logs = "".join(path.read_text() for path in folder.glob("*.log"))
            assert boot.poll() is None, logs
            assert time.monotonic() < deadline, f"no node is idle\n{logs}"
            time.sleep(0.2)
        yield slurm
    finally:
        for child in Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)  # the first process of the namespace, and so all of it
        boot.wait()


def _alone() -> list[str]:
    # Whoever dies first, the test or unshare, takes the daemons along.
    namespaces = ["--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces]
