"""Training over nodes with their own addresses: a link is cut, a node dies, and the run goes on with those left."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS, BATCH = 400, 24
ROOT = Path(__file__).resolve().parents[2]

found = importlib.util.spec_from_file_location("nodes", Path(__file__).with_name("nodes.py"))
nodes_module = importlib.util.module_from_spec(found)
sys.modules["nodes"] = nodes_module
found.loader.exec_module(nodes_module)

WHY_NOT = nodes_module.missing() or (None if shutil.which("pdsh") else "needs the command pdsh (Debian: pdsh)")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def lines(path: Path) -> list[dict]:
    """The whole lines of a file that may be being written."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps_done(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return max((line["step"] for line in lines(metrics)), default=0) if metrics.exists() else 0


class Job:
    """The one command of a user, given on the login node again and again, with the nodes there are."""

    def __init__(self, login, folder: Path, data: Path, stage: int) -> None:
        self.login, self.folder, self.out = login, folder, folder / "out"
        tree = {
            "name": "tiny",
            "model": {
                "patch_size": 4, "layers": 1, "width": 24, "mlp": 24, "heads": 3,
                "image_size": 8, "channels": 1, "num_classes": 10,
            },
            "data": {"train": str(data), "workers": 1, "audit": True, "patience_minutes": 0.1},
            "train": {
                "global_batch": BATCH, "micro_batch": 4, "steps": STEPS, "hang_minutes": 0.15, "slow_minutes": 0.5,
            },
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": 5},
            "checkpoint": {"every": 10},
            "logging": {"every": 1, "peak_tflops": 0.1, "tensorboard": False},
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }  # fmt: skip
        (folder / "tiny.json").write_text(json.dumps(tree))
        # What a user's shell holds does not reach the nodes through ssh; this file does.
        place = f"PATH={Path(sys.executable).parent}:/usr/bin:/bin\nGLOO_SOCKET_IFNAME=eth0\n"
        (folder / "deepspeed_env").write_text(place + "OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")

    def start(self, *hosts: str) -> subprocess.Popen:
        self.console = (self.folder / f"console-{len(hosts)}.txt").open("w+")
        hostfile = self.hostfile(*hosts)
        words = [Path(sys.executable).with_name("deepspeed"), "--hostfile", hostfile, "--launcher", "pdsh"]
        words += ["--force_multi", "launch/pretrain.py", "--config", self.folder / "tiny.json", "--out", self.out]
        return subprocess.Popen(
            self.words(*words), stdout=self.console, stderr=subprocess.STDOUT, start_new_session=True
        )

    def watched(self, *overrides: str) -> list[str]:
        """`launch/ssh.sh` with the nodes of the hostfile instead, which gives the command as often as it takes."""
        config = ("--config", self.folder / "tiny.json", *overrides)
        return self.words("launch/ssh.sh", self.folder / "hostfile", self.out, *config)

    def hostfile(self, *hosts: str) -> Path:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{host} slots=1\n" for host in hosts))
        return path

    def words(self, *words: object) -> list[str]:
        place = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
        return self.login.words("env", place, f"DS_ENV_FILE={self.folder}/deepspeed_env", "DS_ACCELERATOR=cpu", *words)

    def processes(self, node) -> str:
        """The run's processes on a node, by number."""
        return node.run("pgrep", "-f", "launch/pretrain.py").stdout

    def said(self) -> str:
        self.console.seek(0)
        return self.console.read()

    def reach(self, process: subprocess.Popen, step: int, seconds: float = 120) -> None:
        """Wait until `step` steps are done; the run must be going on."""
        deadline = time.monotonic() + seconds
        while steps_done(self.out) < step:
            assert process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def end(self, process: subprocess.Popen, seconds: float) -> int:
        """The command's status, which it must give within `seconds`."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s\n{self.said()}")


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1])
def test_a_cut_link_and_a_dead_node_are_named_and_the_run_goes_on_with_the_nodes_left(stage, digits, run, tmp_path):
    with nodes_module.cluster(["node-a", "node-b", "node-c"], tmp_path / "cluster") as (login, nodes):
        job = Job(login, tmp_path, digits / "train", stage)
        process = job.start("node-a", "node-b", "node-c")
        job.reach(process, 25)
        nodes["node-c"].cut()
        assert job.end(process, 120) not in (0, 2, 75)
        assert re.search(r"error: no sign of life from rank 2 \(node-c\)", job.said()), job.said()
        assert 25 <= steps_done(job.out) < STEPS
        # The rank that was cut off does not go on alone, nor does any other: nothing is left that could write.
        # It cannot tell a cut link from a save that takes long, and waits for `slow_minutes`.
        deadline = time.monotonic() + 60
        while any((left := {name: job.processes(node) for name, node in nodes.items()}).values()):
            assert left["node-a"] + left["node-b"] == "", left
            assert time.monotonic() < deadline, left
            time.sleep(1)

        process = job.start("node-a", "node-b")
        reached = steps_done(job.out)
        job.reach(process, reached + 25)
        assert "resumed from" in job.said()
        nodes["node-b"].kill()
        assert job.end(process, 120) not in (0, 2, 75)
        assert re.search(r"error: no sign of life from rank 1 \(node-b\)", job.said()), job.said()

        process = job.start("node-a")
        assert job.end(process, 180) == 0, job.said()
        assert "resumed from" in job.said()

    words = ("launch/shards.py", "order", digits / "train", "--global-batch", BATCH, "--seed", 0, "--steps")
    order = run(*words, f"0:{STEPS}")
    trained: dict[int, list[int]] = {step: [] for step in range(STEPS)}
    for path in sorted((job.out / "audit").glob("rank_?????.jsonl")):
        for line in lines(path):
            trained[line["step"]] += line["ids"]
    assert [{"step": step, "ids": ids} for step, ids in trained.items()] == [
        json.loads(line) for line in order.stdout.splitlines()
    ]
    assert [line["step"] for line in lines(job.out / "metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.long
def test_a_killed_launcher_is_not_taken_for_the_end_nor_a_running_script_for_a_left_over(digits, tmp_path):
    steps = 3000  # the ranks go on without their launcher, until the script starts again
    with nodes_module.cluster(["node-a", "node-b"], tmp_path / "cluster") as (login, nodes):
        job = Job(login, tmp_path, digits / "train", stage=0)
        job.hostfile("node-a", "node-b")
        job.console = (tmp_path / "console.txt").open("w+")
        words = job.watched(f"train.steps={steps}", "logging.every=5")
        process = subprocess.Popen(words, stdout=job.console, stderr=subprocess.STDOUT, start_new_session=True)
        job.reach(process, 25)
        second = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert (second.returncode, second.stderr.count("\n")) == (2, 1), second.stderr
        assert f"{job.out}: launch/ssh.sh is at work in it (process " in second.stderr

        pdsh = login.run("pgrep", "-x", r"pdsh(\.bin)?").stdout.split()
        assert login.run("kill", "-KILL", *pdsh).returncode == 0
        assert job.end(process, 400) == 0, job.said()
        assert [job.processes(node) for node in nodes.values()] == ["", ""]
    said = job.said()
    assert said.count("status 0, not yet confirmed by the run, last written: step_0") == 2, said
    assert "resumed from" in said, said
    assert f"finished at step {steps} of {steps}; nothing to do" in said, said
    assert [line["step"] for line in lines(job.out / "metrics.jsonl")][-1] == steps
