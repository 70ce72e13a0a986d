"""The ranks of a run: who they are, and the few things they say to each other.

`deepspeed`, `torchrun`, `srun` and plain `python` all end here with the same `World`. Every call is collective unless
it says otherwise, and is a no-op for one rank.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pretrain import files
from pretrain.engine.meeting import announced
from pretrain.engine.ops import compile_ops
from pretrain.engine.place import place
from pretrain.engine.quiet import deepspeed, get_accelerator, quiet
from pretrain.errors import FileSystemError, InputError, StorageError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """One rank's place among the ranks."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0


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


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum of `tensor` over the ranks, in place and returned."""
    if _size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum of `tensor` over the ranks, in place and returned."""
    if _size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_rank(device: torch.device, *flags: bool) -> list[bool]:
    """For each of `flags`, whether it holds on at least one rank; the answers are the same on all."""
    if _size() == 1:
        return list(flags)
    return [bool(flag) for flag in all_reduce_max(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()]


def gather_rows(rows: torch.Tensor) -> torch.Tensor | None:
    """The ranks' `rows` [n, ...], equally many on each, one below the other in rank order: on rank 0, else None."""
    if _size() == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(_size())] if dist.get_rank() == 0 else None
    dist.gather(rows, parts)
    return torch.cat(parts) if parts is not None else None


def collect(values: list[Result]) -> list[Result]:
    """The ranks' lists, one after the other in rank order: on every rank."""
    if _size() == 1:
        return values
    lists: list[list[Result]] = [[] for _ in range(_size())]
    dist.all_gather_object(lists, values)
    return [value for of_rank in lists for value in of_rank]


def gather(value: Result) -> list[Result] | None:
    """The ranks' values, in rank order: on rank 0, else None."""
    if _size() == 1:
        return [value]
    values: list[Any] | None = [None] * _size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def refuse_unlike(value: str, what: str) -> None:
    """Raise InputError on every rank where the ranks' `value`s, of `what`, are not all the same."""
    values = collect([value])
    for rank, found in enumerate(values):
        if found != values[0]:
            raise InputError(
                f"{what} on rank {rank} is {found[:16]}…, on rank 0 {values[0][:16]}…; give every node the same"
            )


def share(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if _size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def together(check: Callable[[], Result]) -> Result:
    """What `check` returns on this rank, unless it refuses on any: then every rank raises the first refusal.

    So does what the file system refuses (`files.refusal`).
    For checks of what ranks on different nodes may see differently. Rank 0 reports for all, and none is left waiting.
    """
    result, refusal = None, None
    try:
        result = check()
    except (InputError, OSError) as error:
        found = error if isinstance(error, InputError) else files.refusal(error)
        if found is None:
            raise
        refusal = (
            next(kind for kind in (StorageError, FileSystemError, InputError) if isinstance(found, kind)),
            str(found),
        )
    refusals = [(*found, rank) for rank, found in enumerate(collect([refusal])) if found is not None]
    if refusals:  # rather one that stays than one that passes
        kind, text, rank = min(refusals, key=lambda found: found[0] is StorageError)
        raise kind(text if rank == 0 else f"{text} (seen by rank {rank})")
    return cast(Result, result)


def is_main() -> bool:
    """Whether this is rank 0, which speaks for all. Not collective."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_main(read: Callable[[], Result]) -> Result:
    """What `read` returns on rank 0, on every rank; what it refuses there, every rank refuses."""
    return cast(Result, share(together(lambda: read() if is_main() else None)))


def portion(values: Sequence[Result]) -> Sequence[Result]:
    """This rank's part of `values`, which all ranks hold alike: every size-th from its rank on. Not collective."""
    return values[dist.get_rank() :: _size()] if _size() > 1 else values


def barrier() -> None:
    """Wait for every rank."""
    if _size() > 1:
        dist.barrier()


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


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
