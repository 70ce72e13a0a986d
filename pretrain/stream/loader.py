"""Micro-batches of uint8 images on the host: planned, read and decoded ahead by threads of this process.

Decoding and resizing leave the interpreter lock, so threads do: no worker processes to copy through or lose.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.errors import InputError
from pretrain.stream.images import GREY, Transform, UnreadableImage
from pretrain.stream.index import Index
from pretrain.stream.order import Order
from pretrain.stream.reader import Counters, Plan, Reader, plan_evaluation, plan_training

_AHEAD = 3  # micro-batches being decoded, at the least
_STRIPE = 8  # images a decode thread takes at a time, at the most

# Called from a decode thread with the sample's id and the error. What it raises ends the stream.
OnFault = Callable[[int, UnreadableImage], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A micro-batch. It is the caller's: nothing writes to it again.

    images: uint8 [m, c, h, w] · labels: int64 [m, L], padded with -1 · ids: np.int64 [m] · valid: bool [m],
    False for an image that could not be read (grey; its id and labels stand) and for a row that pads an
    evaluation (grey; id and labels -1).
    """

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]
    valid: Tensor


@dataclass(frozen=True)
class _Pending:
    plan: Plan
    images: Tensor
    valid: NDArray[np.bool_]
    stripes: list[Future[None]]


class BatchStream:
    """Iterator of `Batch`es in the order of `plans`, a few of them decoded ahead; a context manager.

    `counters` tell what it did. An error in a thread is raised where its batch would have come, and again by
    every later call. Reading has its own threads, so decode threads that wait for a chunk cannot hold it up.
    """

    def __init__(
        self,
        index: Index,
        plans: Iterator[Plan],
        transform: Transform,
        *,
        rows: int,
        window: int,
        workers: int,
        on_fault: OnFault | None,
    ) -> None:
        if workers < 1:
            raise InputError(f"data.workers is {workers}; at least 1 decode thread would be right")
        self.counters = Counters()
        self._index, self._transform, self._rows = index, transform, rows
        self._on_fault = on_fault or _warn_once(index)
        self._stripe = max(1, min(_STRIPE, rows // (2 * workers)))
        self._ahead = max(_AHEAD, -(-2 * workers * self._stripe // rows))
        self._pending: deque[_Pending] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._reader = Reader(index, plans, window, self.counters)
        self._threads = _decode_threads(workers)
        self._fill()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if not self._pending:
            self.close()
            raise StopIteration
        pending = self._pending.popleft()
        try:
            self._fill()
            for stripe in pending.stripes:
                stripe.result()
        except BaseException as error:
            self._error = error
            self.close()
            raise
        ids = pending.plan.ids
        return Batch(pending.images, self._labels(ids), ids, torch.from_numpy(pending.valid))

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them: at most for the image or the read that each is busy with."""
        self._closed = True
        self._pending.clear()
        # First what decode threads may be waiting for: a cancelled read lets go of them.
        self._reader.close()
        self._threads.shutdown()

    def _fill(self) -> None:
        """Hand micro-batches to the decode threads until enough are under way, each in a fresh buffer."""
        size, channels = self._transform.image_size, self._transform.channels
        while len(self._pending) < self._ahead and (plan := next(self._reader, None)) is not None:
            images = torch.empty(self._rows, channels, size, size, dtype=torch.uint8)
            pending = _Pending(plan, images, plan.ids >= 0, [])
            for first in range(0, self._rows, self._stripe):
                rows = range(first, min(first + self._stripe, self._rows))
                pending.stripes.append(self._threads.submit(self._decode, pending, rows))
            self._pending.append(pending)

    def _decode(self, pending: _Pending, rows: range) -> None:
        plan = pending.plan
        starved = busy = 0.0
        images = unreadable = 0
        for row in rows:
            if self._closed:
                return
            chunk, sample_id = plan.chunks[row], int(plan.ids[row])
            if chunk is None:
                pending.images[row] = GREY
                continue
            asked = time.perf_counter()
            data = chunk.take(sample_id)
            given = time.perf_counter()
            try:
                pending.images[row] = self._transform(data, int(plan.epochs[row]), sample_id)
            except UnreadableImage as error:
                # Skipping it would shift the order of all that follows.
                pending.images[row] = GREY
                pending.valid[row] = False
                unreadable += 1
                self._on_fault(sample_id, error)
            images += 1
            starved += given - asked
            busy += time.perf_counter() - given
        self.counters.add(images=images, unreadable=unreadable, decode_seconds=busy, starved_seconds=starved)

    def _labels(self, ids: NDArray[np.int64]) -> Tensor:
        real = ids >= 0
        found = self._index.labels(ids[real])
        labels = np.full((len(ids), found.shape[1]), -1, np.int64)
        labels[real] = found
        return torch.from_numpy(labels)


class TrainLoader(BatchStream):
    """A rank's micro-batches of steps start_step <= t < stop_step (None: without end), in slot order.

    Rank r owns slots [r·B/world, (r+1)·B/world) of every step. The transform sees a sample's bytes, epoch and
    id alone, so the global batch is the same for any world, micro_batch and workers (decode threads a rank).
    Raises InputError where the batch does not divide, or the order is for another number of samples.
    """

    def __init__(
        self,
        index: Index,
        order: Order,
        transform: Transform,
        *,
        micro_batch: int,
        rank: int,
        world: int,
        workers: int,
        start_step: int = 0,
        stop_step: int | None = None,
        on_fault: OnFault | None = None,
    ) -> None:
        _check_rank(rank, world)
        batch = order.global_batch
        if batch % world:
            raise InputError(f"train.global_batch is {batch}; a multiple of the {world} ranks would be right")
        if micro_batch < 1 or batch // world % micro_batch:
            raise InputError(
                f"train.micro_batch is {micro_batch}; a divisor of {batch // world} would be right: "
                f"train.global_batch {batch} over {world} ranks"
            )
        if order.samples != index.samples:
            raise InputError(f"the order is for {order.samples} samples, the index holds {index.samples}")
        if start_step < 0 or (stop_step is not None and stop_step < start_step):
            raise InputError(f"steps {start_step} to {stop_step}; 0 <= start <= stop would be right")
        super().__init__(
            index,
            plan_training(order, micro_batch, rank, world, start_step, stop_step),
            transform,
            rows=micro_batch,
            # One chunk a lane, and half a chunk more: the lane that changes last has its next one in time.
            window=-(-3 * order.lane_count * order.chunk // (2 * world)),
            workers=workers,
            on_fault=on_fault,
        )


def evaluation_batches(
    index: Index,
    transform: Transform,
    *,
    batch: int,
    rank: int,
    world: int,
    workers: int,
    ids: Sequence[int] | NDArray[np.int64] | None = None,
    on_fault: OnFault | None = None,
) -> BatchStream:
    """Every sample of `ids` (default: of the index) once over all ranks, in the order given.

    Step t of rank r holds run t·world + r of `batch` ids: the batches, by step and then by rank, are `ids`.
    Every rank gets the same number of batches; rows beyond the end are padding, valid False. Transforms are
    called with epoch 0. Raises InputError for an id outside the index.
    """
    _check_rank(rank, world)
    if batch < 1:
        raise InputError(f"evaluation batch is {batch}; at least 1 would be right")
    chosen = np.arange(index.samples) if ids is None else np.asarray(ids, np.int64).reshape(-1)
    wrong = chosen[(chosen < 0) | (chosen >= index.samples)]
    if len(wrong):
        raise InputError(f"sample {wrong[0]} is not in the index, whose ids are 0 to {index.samples - 1}")
    return BatchStream(
        index,
        plan_evaluation(chosen, batch, rank, world),
        transform,
        rows=batch,
        window=batch,
        workers=workers,
        on_fault=on_fault,
    )


def _decode_threads(workers: int) -> ThreadPoolExecutor:
    """Threads within which torch does not start threads of its own."""
    # torch.set_num_threads() holds for the calling thread and for any that asks for the first time later. So
    # each of these asks before it sets its own, and the caller then sets its own again.
    own = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def settle() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)

    threads = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=settle)
    for _ in range(workers):
        threads.submit(started.wait)
    started.wait()
    torch.set_num_threads(own)
    return threads


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world}; 0 <= rank < world would be right")


def _warn_once(index: Index) -> OnFault:
    """The default for unreadable images: the first is logged with its place, all are counted."""
    once = threading.Lock()

    def warn(sample_id: int, error: UnreadableImage) -> None:
        if once.acquire(blocking=False):  # never released
            (place,) = index.extents(np.array([sample_id]))
            where = f"{place.url}, byte {place.begin}"
            _log.warning("sample %d (%s) cannot be decoded: %s; grey and masked", sample_id, where, error)
            _log.warning("further unreadable images are counted, not reported")

    return warn
