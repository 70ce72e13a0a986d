"""The ranks of a run and their collectives. Functions are collective unless they say otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from pretrain import files
from pretrain.errors import FileSystemError, InputError, StorageError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """Which rank this is, of how many, on which device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0


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


def all_gather_list(values: list[Result]) -> list[Result]:
    """The ranks' lists, one after the other in rank order: on every rank."""
    if _size() == 1:
        return values
    lists: list[list[Result]] = [[] for _ in range(_size())]
    dist.all_gather_object(lists, values)
    return [value for of_rank in lists for value in of_rank]


def gather_object(value: Result) -> list[Result] | None:
    """The ranks' values, in rank order: on rank 0, else None."""
    if _size() == 1:
        return [value]
    values: list[Any] | None = [None] * _size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def require_same(value: str, what: str) -> None:
    """Raise InputError on every rank if `value`, of `what`, is not the same on all ranks."""
    values = all_gather_list([value])
    for rank, found in enumerate(values):
        if found != values[0]:
            raise InputError(
                f"{what} on rank {rank} is {found[:16]}…, on rank 0 {values[0][:16]}…; give every node the same"
            )


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if _size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def together(check: Callable[[], Result]) -> Result:
    """What `check` returns on this rank; if it raises InputError on any rank, every rank raises it, none waits.

    An OSError that `files.refusal` knows counts as InputError. For checks of what ranks on different nodes may see
    differently; rank 0 reports for all.
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
    refusals = [(*found, rank) for rank, found in enumerate(all_gather_list([refusal])) if found is not None]
    if refusals:  # a lasting one before one that passes
        kind, text, rank = min(refusals, key=lambda found: found[0] is StorageError)
        raise kind(text if rank == 0 else f"{text} (seen by rank {rank})")
    return cast(Result, result)


def is_main() -> bool:
    """Whether this is rank 0, which prints for all. Not collective."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_main(read: Callable[[], Result]) -> Result:
    """What `read` returns on rank 0, on every rank; what it raises there, every rank raises."""
    return cast(Result, broadcast_object(together(lambda: read() if is_main() else None)))


def rank_slice(values: Sequence[Result]) -> Sequence[Result]:
    """This rank's part of `values`, the same on all ranks: values[rank::size]. Not collective."""
    return values[dist.get_rank() :: _size()] if _size() > 1 else values


def barrier() -> None:
    """Wait for every rank."""
    if _size() > 1:
        dist.barrier()


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
