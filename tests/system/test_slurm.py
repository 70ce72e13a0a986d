"""launch/slurm.sbatch under a real Slurm: time limit, signal, requeue, resume, a dead rank, scancel, a bad config."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import History, history, lines
from tests.system.slurm import Slurm, cluster, missing

WHY_NOT = missing()
pytestmark = [pytest.mark.long, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]

STEPS, BATCH = 600, 24
# Slurm looks every 30 s whether time is up: the signal comes 60 to 90 s after the start, the end after 120.
RANKS = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
TIMES = ("--time=2", "--signal=USR1@30")
SCRIPT = "launch/slurm.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory) -> Path:
    return tiny_config(
        tmp_path_factory.mktemp("config") / "tiny.json",
        model={"dropout": 0.1},
        data={"audit": True, "chunk": 1},
        train={"global_batch": BATCH, "steps": STEPS},
        checkpoint={"every": 20},
    )


@pytest.fixture(scope="module")
def undisturbed(config, run, tmp_path_factory) -> History:
    """The same run on two ranks without Slurm, from a disk, in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run("launch/pretrain.py", "--config", config, "--out", out, ranks=2)
    assert done.returncode == 0, done.stderr
    return history(out)


@pytest.fixture
def bucket(serve, digits, run, tmp_path):
    """The digits behind a server whose answers take long: a run that lasts until its time is up, on any machine."""
    server = serve(digits / "train")
    server.latency = 0.0
    index = tmp_path / "train.vfi"
    urls = [f"{server.http}/{shard.name}" for shard in sorted((digits / "train").glob("*.tar"))]
    done = run("launch/shards.py", "index", *urls, "--out", index)
    assert done.returncode == 0, done.stderr
    server.latency = 1.0
    return server, index


def step(out: Path) -> int:
    """The last step that the metrics hold."""
    return max((line["step"] for line in lines(out / "metrics.jsonl")), default=0)


def latest(out: Path) -> int:
    """The step of the last checkpoint."""
    return int((out / "checkpoints" / "latest").read_text().removeprefix("step_"))


def ranks_of(out: Path) -> list[int]:
    """The processes that train in this folder, by their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[0].endswith("python") and "launch/pretrain.py" in words and str(out) in words:
            found.append(int(process.name))
    return found


def test_a_job_goes_on_through_its_time_limit_and_a_dead_rank_to_the_end(
    slurm: Slurm, config, undisturbed, bucket, digits, run, tmp_path
):
    server, index = bucket
    out = tmp_path / "run"
    job = slurm.submit(*RANKS, *TIMES, SCRIPT, out, "--config", config, f"data.train={index}")

    slurm.until(job, lambda: "stopped: SIGUSR1" in slurm.said(job), "the signal")
    stopped_at = latest(out)
    assert stopped_at == step(out) < STEPS, "saved is the step under way, not one before"
    slurm.until(job, lambda: slurm.job(job)["Restarts"] == "1", "the first requeue")
    assert "stopped with a checkpoint: requeued" in slurm.said(job)
    assert slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60").returncode == 0

    slurm.until(job, lambda: step(out) > stopped_at, "a step after the resume")
    assert f"resumed from {out}/checkpoints/step_{stopped_at:08d}" in slurm.said(job)
    slurm.until(job, lambda: latest(out) > stopped_at, "a checkpoint after the resume")  # or the job gives up
    os.kill(ranks_of(out)[-1], signal.SIGKILL)
    server.latency = 0.0
    ended = slurm.wait(job, "COMPLETED")
    said = slurm.said(job)
    assert (ended["Restarts"], ended["ExitCode"]) == ("2", "0:0"), slurm.why(job, "two restarts")
    assert re.search(r"status 137, there is more in .* than before: requeued", said), said
    assert latest(out) == STEPS

    resumed = history(out)
    assert resumed.losses == undisturbed.losses
    words = ("launch/shards.py", "order", digits / "train", "--global-batch", BATCH, "--chunk", 1, "--seed", 0)
    order = run(*words, "--steps", f"0:{STEPS}")
    assert order.returncode == 0, order.stderr
    assert resumed.ids == [json.loads(line)["ids"] for line in order.stdout.splitlines()]


def test_scancel_saves_and_ends_the_job(slurm: Slurm, config, undisturbed, bucket, tmp_path):
    server, index = bucket
    out = tmp_path / "run"
    job = slurm.submit(*RANKS, "--time=60", SCRIPT, out, "--config", config, f"data.train={index}")
    slurm.until(job, lambda: step(out) >= 5, "five steps")
    assert slurm.run("scancel", job).returncode == 0
    ended = slurm.wait(job, "CANCELLED")
    while not slurm.idle():  # the ranks are saving
        time.sleep(0.2)
    assert not ranks_of(out)
    assert "stopped: SIGTERM" in slurm.said(job), slurm.said(job)
    assert 5 <= latest(out) == step(out) < STEPS
    assert ended["Restarts"] == "0"
    assert "requeued" not in slurm.said(job)

    server.latency = 0.0
    again = slurm.submit(*RANKS, "--time=60", SCRIPT, out, "--config", config, f"data.train={index}")
    slurm.wait(again, "COMPLETED")
    assert history(out).trained == undisturbed.trained


def test_a_config_at_fault_ends_the_job_with_status_2(slurm: Slurm, config, tmp_path):
    job = slurm.submit(*RANKS, "--time=60", SCRIPT, tmp_path / "run", "--config", config, "train.global_batch=23")
    ended = slurm.wait(job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), slurm.said(job)
    assert "error: " in slurm.said(job)
    assert "23" in slurm.said(job)
