"""The process group: how `deepspeed`, `torchrun`, `srun` and plain `python` all become the same `World`."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.engine.ops import compile_ops
from pretrain.engine.quiet import deepspeed, get_accelerator, quiet
from pretrain.errors import InputError
from pretrain.ranks.collectives import World
from pretrain.ranks.launcher import place
from pretrain.ranks.rendezvous import announced


def start(timeout_minutes: float = 30.0) -> World:
    """Join the process group that the launcher described in the environment; without a launcher, be the only rank.

    Raises:
        InputError: ranks have not come within `timeout_minutes`, or the address where they meet is taken.
    """
    mine = place(os.environ)
    os.environ.update(mine)
    local_rank = int(mine["LOCAL_RANK"])
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(_device_number(local_rank, accelerator.device_count()))
    _allow_open_files()
    compile_ops()
    try:
        with announced({**os.environ, **mine}), quiet(), _without_shared_memory():
            deepspeed.init_distributed(
                dist_backend=accelerator.communication_backend_name(),
                auto_mpi_discovery=False,
                timeout=timedelta(minutes=timeout_minutes),
                verbose=False,
            )
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise InputError(
            f"{mine['MASTER_ADDR']}:{mine['MASTER_PORT']}, where {mine['WORLD_SIZE']} ranks meet: "
            f"{str(error).splitlines()[0]}; start all of them where they reach this address, and name another "
            "MASTER_PORT where this one is taken"
        ) from error
    device = torch.device(accelerator.current_device_name())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Each rank would take every core: the ranks of a host share them.
        torch.set_num_threads(
            max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1))
        )
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
    """Have DeepSpeed take the ranks of a CPU host for ranks of several.

    It would give each 69 MB of /dev/shm, for an all-reduce that is for inference alone, and leave them there behind it:
    memory that a host loses with every run, until it is started anew.
    """
    told = os.environ.get("LOCAL_SIZE")
    os.environ["LOCAL_SIZE"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_SIZE"]
        if told is not None:
            os.environ["LOCAL_SIZE"] = told


def _allow_open_files() -> None:
    """Lift this process's limit as far as it may: rank 0 holds two connections to every rank."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
