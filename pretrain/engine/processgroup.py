"""Joining the process group, under any launcher: `deepspeed`, `torchrun`, `srun`, `mpirun`, or none."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from pretrain.console import say
from pretrain.engine.quiet import deepspeed, get_accelerator, get_default_build_root, quiet
from pretrain.errors import InputError
from pretrain.ranks.collectives import World
from pretrain.ranks.launcher import local_rank, rank_variables
from pretrain.ranks.rendezvous import announced

# The op that DeepSpeed's communication layer builds as it starts on a CPU host; no op is needed elsewhere.
_BUILDER, _OP = "ShareMemCommBuilder", "deepspeed_shm_comm"
_TURN = 10.0  # seconds: the ranks of a host that find the op compiled have had their turns by then


def start(*, meet_minutes: float = 30.0, part_minutes: float = 0.0) -> World:
    """Join the process group that the launcher described in the environment; without a launcher, be the only rank.

    Args:
        meet_minutes: how long to wait for all ranks.
        part_minutes: how long a rank may take between two collectives, if that is longer. The watchdog ends a run whose
            rank takes longer; its message is better than that of a collective's time-out, which comes a minute later.

    Raises:
        InputError: ranks have not come in time, or the address where they meet is taken.
    """
    mine = rank_variables(os.environ)
    os.environ.update(mine)
    local_rank = int(mine["LOCAL_RANK"])
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(_device_number(local_rank, accelerator.device_count()))
    else:
        _compile_ops()
    # torch lets cuDNN's convolutions, alone of all products, round fp32 numbers to TF32's eleven bits.
    torch.backends.cudnn.allow_tf32 = False
    # Rank 0 holds two connections to every rank.
    with contextlib.suppress(ValueError, OSError):
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        with announced({**os.environ, **mine}), quiet(), _without_shared_memory():
            deepspeed.init_distributed(
                dist_backend=accelerator.communication_backend_name(),
                auto_mpi_discovery=False,
                timeout=timedelta(minutes=max(meet_minutes, part_minutes and part_minutes + 1)),
                verbose=False,
            )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise InputError(
            f"{mine['MASTER_ADDR']}:{mine['MASTER_PORT']}, where {mine['WORLD_SIZE']} ranks meet: "
            f"{str(error).splitlines()[0]}; start all of them where they reach this address, and name another "
            "MASTER_PORT where this one is taken"
        ) from error
    device = torch.device(accelerator.current_device_name())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # each rank would take every core of its host
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, cores // local_size))
    return World(rank=int(mine["RANK"]), size=int(mine["WORLD_SIZE"]), local_rank=local_rank, device=device)


def stop() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device_number(local_rank: int, visible: int) -> int:
    """Which of the visible devices is this rank's: its own, or the only one where the launcher shows each its own."""
    if local_rank < visible:
        return local_rank
    if visible == 1:
        return 0
    refusal = InputError(
        f"local rank {local_rank}, but {visible} devices are visible to it; start at most as many ranks on a node "
        "as it has devices"
    )
    refusal.only_this_rank = local_rank == visible  # the first of its host without one speaks for those after it
    raise refusal


@contextlib.contextmanager
def _without_shared_memory() -> Iterator[None]:
    """Make DeepSpeed believe that the ranks of a CPU host are on several hosts.

    It would give each 69 MB of /dev/shm, for an all-reduce that only inference uses, and never release them: memory
    that the host loses with every run until it is restarted.
    """
    before = os.environ.get("LOCAL_SIZE")
    os.environ["LOCAL_SIZE"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_SIZE"]
        if before is not None:
            os.environ["LOCAL_SIZE"] = before


def _take_turn(turn: TextIO, announce: bool) -> None:
    """Wait for the lock, and say so where that takes longer than the ranks of one host do."""
    due = time.monotonic() + _TURN
    while True:
        try:
            return fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        if announce and time.monotonic() > due:
            say(f"waiting for another process to compile DeepSpeed's CPU ops ({turn.name} is locked) …", to=sys.stderr)
            due = math.inf


def _compile_ops() -> None:
    """Compile the C++ op that DeepSpeed needs on a CPU host, if that has not been done; the ranks of a host take turns.

    torch guards a build by a plain file, which a killed process leaves behind and every later run then waits for. This
    lock is released with its holder, so a file that the holder finds is stale and is removed.

    Raises:
        InputError: no C++ compiler or no ninja, and the op must be compiled.
    """
    # One ninja, this interpreter's own: another version rebuilds what the first has built.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "vit_foundry.lock", "w") as turn:
        with contextlib.suppress(OSError):  # a file system without locks
            _take_turn(turn, announce=local_rank(os.environ) == 0)
        if not any(root.glob(f"**/{_OP}/{_OP}.so")):
            compiler = os.environ.get("CXX", "c++")
            if shutil.which(compiler) is None:
                raise InputError(
                    f"DeepSpeed compiles C++ ops, and there is no {compiler!r}: install g++ (Debian: apt-get install "
                    "g++)"
                )
            if shutil.which("ninja") is None:
                raise InputError("DeepSpeed compiles C++ ops, and there is no ninja on PATH: pip install ninja")
            say("DeepSpeed compiles its CPU ops once for this machine; about a minute …", to=sys.stderr)
        for stale in root.glob(f"**/{_OP}/lock"):
            stale.unlink()
        with quiet():
            get_accelerator().create_op_builder(_BUILDER).load()
