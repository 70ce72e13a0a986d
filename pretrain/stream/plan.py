"""Which samples a rank needs, micro-batch by micro-batch, and the chunks it reads them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.stream.chunk import Chunk
from pretrain.stream.order import Order

_PLANNED_AT_ONCE = 4096  # positions: enough for numpy's cost per call to vanish
_EVALUATION_RUN = 16  # samples read together where ids are consecutive


@dataclass(frozen=True)
class Plan:
    """A micro-batch to come: ids and epochs [m] of its rows, and the chunk that each is read with.

    Rows that pad an evaluation have id -1 and no chunk. `fresh`: the chunks that are needed here for the first time.
    """

    ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    chunks: Sequence[Chunk | None]
    fresh: Sequence[Chunk]


def plan_training(
    order: Order,
    micro_batch: int,
    rank: int,
    world: int,
    start_step: int,
    stop_step: int | None,
    trained: NDArray[np.int64] | None = None,
) -> Iterator[Plan]:
    """A rank's micro-batches in slot order, of steps start_step <= t < stop_step (None: without end).

    `trained`: canonical ids [order.samples], ascending: the order is of these, and a chunk is neighbours among them.
    None: of all samples.
    """
    batch, g = order.global_batch, order.chunk
    share = batch // world
    slots = np.arange(rank * share, (rank + 1) * share)
    at_once = max(1, _PLANNED_AT_ONCE // share)
    stop = stop_step if stop_step is not None else (1 << 62) // batch
    canonical = (lambda numbers: numbers) if trained is None else trained.__getitem__
    unfinished: dict[int, tuple[Chunk, int]] = {}  # number of a chunk over all epochs -> (it, uses planned so far)

    def open_chunks(positions: NDArray[np.int64], numbers: NDArray[np.int64]) -> list[Chunk]:
        """Chunks `numbers` [k], first needed at `positions` [k], each with the samples that this rank takes."""
        found = order.siblings(positions)
        exist = found >= 0
        mine = exist & (found >= start_step * batch) & (found < stop * batch)
        mine &= (found % batch >= slots[0]) & (found % batch <= slots[-1])
        whole = (mine == exist).all(axis=1)
        counts = mine.sum(axis=1)
        parts = np.split(order.at(found[~whole][mine[~whole]]), np.cumsum(counts[~whole])[:-1])
        rest = iter(parts)
        return [
            Chunk(canonical(np.arange(number * g, number * g + count) if complete else np.sort(next(rest))))
            for number, count, complete in zip(numbers.tolist(), counts.tolist(), whole.tolist(), strict=True)
        ]

    for step in range(start_step, stop, at_once):
        steps = np.arange(step, min(step + at_once, stop))
        positions = (steps[:, None] * batch + slots).ravel()
        ids, epochs = order.at(positions), positions // order.samples
        keys = epochs * (order.samples // g + 1) + ids // g
        distinct, first, uses = np.unique(keys, return_index=True, return_counts=True)
        unseen = np.array([key not in unfinished for key in distinct.tolist()])
        begins = np.sort(first[unseen])
        opened = open_chunks(positions[begins], ids[begins] // g)
        unfinished.update(zip(keys[begins].tolist(), ((chunk, 0) for chunk in opened), strict=True))
        chunks = [unfinished[key][0] for key in keys.tolist()]
        for key, count in zip(distinct.tolist(), uses.tolist(), strict=True):
            chunk, planned = unfinished.pop(key)
            if planned + count < len(chunk.ids):
                unfinished[key] = chunk, planned + count
        for row in range(0, len(ids), micro_batch):
            rows = slice(row, row + micro_batch)
            begin, end = np.searchsorted(begins, [row, row + micro_batch])
            yield Plan(canonical(ids[rows]), epochs[rows], chunks[rows], opened[begin:end])


def plan_evaluation(ids: NDArray[np.int64], batch: int, rank: int, world: int) -> Iterator[Plan]:
    """A rank's batches: step t takes run t·world + rank of `batch` ids; every rank gets equally many batches."""
    for step in range(-(-len(ids) // (batch * world))):
        begin = (step * world + rank) * batch
        taken = ids[begin : begin + batch]
        runs = np.split(taken, np.flatnonzero(np.diff(taken) != 1) + 1)
        fresh = [Chunk(run[at : at + _EVALUATION_RUN]) for run in runs for at in range(0, len(run), _EVALUATION_RUN)]
        chunks: list[Chunk | None] = [chunk for chunk in fresh for _ in chunk.ids]
        padding = batch - len(taken)
        padded = np.concatenate([taken, np.full(padding, -1, np.int64)])
        yield Plan(padded, np.zeros(batch, np.int64), chunks + [None] * padding, fresh)
