"""Ranks under Open MPI's and MPICH's own launchers train as under `deepspeed`; their status arrives."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import History, history

LAUNCHERS = {
    "mpirun.openmpi": ("openmpi-bin", "--oversubscribe", "-x", "MASTER_ADDR=127.0.0.1"),
    "mpiexec.hydra": ("mpich", "-genv", "MASTER_ADDR", "127.0.0.1"),
}
SCRIPT = "launch/pretrain.py"
pytestmark = pytest.mark.long


@pytest.fixture(params=LAUNCHERS)
def launcher(request, monkeypatch) -> list[str]:
    """The words before `python`: two ranks on this machine."""
    package, *options = LAUNCHERS[request.param]
    if shutil.which(request.param) is None:
        pytest.skip(f"needs the command {request.param} (Debian: {package})")
    if os.geteuid() == 0:
        monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
        monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    return [request.param, "-n", "2", *options, sys.executable]


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory) -> Path:
    return tiny_config(
        tmp_path_factory.mktemp("config") / "tiny.json",
        model={"dropout": 0.1},
        data={"audit": True},
        deepspeed={"zero_optimization": {"stage": 1}},
    )


@pytest.fixture(scope="module")
def under_deepspeed(real, config, tmp_path_factory) -> History:
    out = tmp_path_factory.mktemp("deepspeed") / "run"
    done = real("deepspeed", "--num_gpus", 2, SCRIPT, "--config", config, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return history(out)


def test_two_ranks_under_mpi_train_as_under_deepspeed_and_resume(launcher, under_deepspeed, real, config, tmp_path):
    command = (*launcher, SCRIPT, "--config", config, "--out", tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    stopped = real(*command)
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    resumed = real(*command)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "batch 24 = 2 ranks" in resumed.stdout
    assert "resumed from" in resumed.stdout
    assert history(tmp_path / "run").trained == under_deepspeed.trained


def test_a_config_at_fault_ends_mpi_with_status_2(launcher, real, config, tmp_path):
    done = real(*launcher, SCRIPT, "--config", config, "--out", tmp_path / "run", "train.global_batch=23")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: train.global_batch: 23 does not divide among 2 ranks" in done.stdout + done.stderr
