"""What the environment says of a rank, whichever launcher set it: its number, how many there are, where they meet."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.errors import InputError


@dataclass(frozen=True)
class Mpi:
    """The variables that an MPI launcher sets; `set_master` is its option that sets MASTER_ADDR."""

    rank: str
    size: str
    local_rank: str
    local_size: str
    set_master: str

    def master(self, env: Mapping[str, str]) -> str:
        """The host of rank 0. MPI tells it only to programs that speak MPI; on a single node it is this host."""
        if env[self.size] == env[self.local_size]:
            return "127.0.0.1"
        raise InputError(
            f"mpirun: {env[self.size]} ranks, {env[self.local_size]} of them on the first node, and MASTER_ADDR is not "
            f"set; name the host of rank 0, the first of the hostfile: mpirun {self.set_master} …"
        )


OPEN_MPI = Mpi(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "-x MASTER_ADDR=HOST",
)
# MPICH and Intel MPI. srun --mpi=pmi2 sets the first two as well, not the others.
HYDRA = Mpi("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "-genv MASTER_ADDR HOST")


def rank_variables(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and LOCAL_SIZE where the launcher sets it.

    Raises:
        InputError: the launcher does not say on which host rank 0 is.
    """
    if "RANK" in env and "WORLD_SIZE" in env:  # deepspeed, torchrun
        return {
            "RANK": env["RANK"],
            "WORLD_SIZE": env["WORLD_SIZE"],
            "LOCAL_RANK": env.get("LOCAL_RANK", "0"),
            "MASTER_ADDR": env.get("MASTER_ADDR", "127.0.0.1"),
            "MASTER_PORT": env.get("MASTER_PORT", "29500"),
        }
    # Before Slurm: in an allocation mpirun starts its daemons through srun, and the ranks inherit their variables.
    for mpi in (OPEN_MPI, HYDRA):
        if mpi.rank in env and mpi.local_rank in env:
            return {
                "RANK": env[mpi.rank],
                "WORLD_SIZE": env[mpi.size],
                "LOCAL_RANK": env[mpi.local_rank],
                "LOCAL_SIZE": env[mpi.local_size],
                "MASTER_ADDR": env.get("MASTER_ADDR") or mpi.master(env),
                "MASTER_PORT": env.get("MASTER_PORT") or "29500",
            }
    # Not SLURM_NTASKS: it is also set in an interactive allocation, where plain python is one rank.
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
            # The same for all tasks, another for another job on the node.
            "MASTER_PORT": env.get("MASTER_PORT") or str(20_000 + int(env["SLURM_JOB_ID"]) % 10_000),
        }
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def rank(env: Mapping[str, str]) -> int:
    """This rank's number, also where nothing else is set; 0 without a launcher."""
    return _first_set(env, "RANK", OPEN_MPI.rank, HYDRA.rank, "SLURM_PROCID")


def local_rank(env: Mapping[str, str]) -> int:
    """This rank's number on its host, also where nothing else is set; 0 without a launcher."""
    return _first_set(env, "LOCAL_RANK", OPEN_MPI.local_rank, HYDRA.local_rank, "SLURM_LOCALID")


def _first_set(env: Mapping[str, str], *names: str) -> int:
    return next((int(env[name]) for name in names if name in env), 0)


def _first_host(node_list: str) -> str:
    if not any(mark in node_list for mark in "[,"):
        return node_list
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"srun: scontrol could not expand the node list {node_list!r} ({error}); set MASTER_ADDR to the first node"
        ) from None
    return answer.stdout.split()[0]


def free_port() -> int:
    """A free TCP port of this host, below those that the kernel gives to connections (from 32,768 on).

    One of those may be taken again before the caller listens.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise InputError("no free TCP port found among 100 of those from 20,000 to 32,000; set MASTER_PORT")
