"""Micro-batches of images on the host: planned, read and decoded ahead by threads of this process.

Decoding and resizing release the interpreter lock, so threads suffice: no worker processes to copy through or lose.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.errors import InputError
from pretrain.images.decode import GREY, Encoded, UnreadableImage, decode
from pretrain.images.mixing import Mixing, keep_whole
from pretrain.images.transforms import Transform, to_float, to_unit_
from pretrain.index.index import Index
from pretrain.storage.retry import Timeouts
from pretrain.stream.buffers import Buffers
from pretrain.stream.counters import Counters, Laps
from pretrain.stream.fault import NOT_READ, ChunkError, Fault
from pretrain.stream.order import Order
from pretrain.stream.plan import Plan, plan_evaluation, plan_training
from pretrain.stream.reader import READ_AHEAD, Reader

_AHEAD = 3  # micro-batches being decoded, at the least
_STRIPE = 16  # images a decode thread takes at a time, at the most


@dataclass(frozen=True)
class LoaderOptions:
    """How a rank loads its batches. None of it changes which sample is trained on at which step.

    Args:
        rank, world: this rank, and how many there are.
        workers: decode threads a rank.
        read_ahead: bytes of shards read beyond what is asked for.
        unreadable_chunks: for the samples of a chunk that cannot be read: "raise" a ChunkError at their batch; "mask":
            they come grey and masked, with their faults; "stop": they are masked, and nothing is read after the first
            such chunk, as a run that will end for it should not wait for more of them. Where storage does not serve
            a chunk for now, nothing is read after it in any case: each of the others would be waited for as long.
        pin: page-locked images, for copies that do not wait.
        floats: images in [-1, 1], converted while a row is in the cache, for a host that trains.
        timeouts: how long remote shards are waited for; by default `retry.TIMEOUTS`.
    """

    rank: int = 0
    world: int = 1
    workers: int = 4
    read_ahead: int = READ_AHEAD
    unreadable_chunks: Literal["raise", "mask", "stop"] = "raise"
    pin: bool = False
    floats: bool = False
    timeouts: Timeouts | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise InputError(f"rank {self.rank} of {self.world}; 0 <= rank < world would be right")


@dataclass(frozen=True)
class Batch:
    """A micro-batch. It is the caller's: nothing writes to it again.

    images: uint8 [m, c, h, w], channels-last, or with `floats` fp32 in [-1, 1]; on the host.
    labels: int64 [m, L], padded with -1.
    ids: np.int64 [m].
    valid: bool [m], False for a sample that could not be read (grey; its id and labels stand) and for a row that pads
        an evaluation (grey; id and labels -1).
    weight: fp32 [m], each row's own share where pairs are mixed; None where they are not.
    boxes: int64 [m, 4], what CutMix takes from the other of the pair (`mixing.cut_boxes`); None without CutMix.
    faults: one for each sample that could not be read.
    keys: [m], as the shards have them; None for a row that pads, and where a chunk could not be read.
    """

    images: Tensor
    labels: Tensor
    ids: NDArray[np.int64]
    valid: Tensor
    weight: Tensor | None = None
    boxes: Tensor | None = None
    faults: tuple[Fault, ...] = ()
    keys: tuple[str | None, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """Its tensors on a device; from page-locked memory without waiting for what that is busy with."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Its tensors in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            images=change(self.images),
            labels=change(self.labels),
            valid=change(self.valid),
            weight=None if self.weight is None else change(self.weight),
            boxes=None if self.boxes is None else change(self.boxes),
        )


@dataclass(frozen=True)
class _Pending:
    plan: Plan
    images: Tensor
    stripes: list[Future[list[tuple[int, Fault]]]]
    keys: list[str | None]


class BatchStream:
    """Iterator of `Batch`es in the order of `plans`, a few of them decoded ahead; a context manager.

    `rows` is m, `ahead` how many are decoded ahead at the most, `counters` tell what it did. An error in a thread is
    raised in place of its batch, and again by every later call. Reading has its own threads, so decode threads that
    wait for a chunk cannot hold it up.
    """

    def __init__(
        self,
        index: Index,
        plans: Iterator[Plan],
        transform: Transform,
        options: LoaderOptions,
        *,
        rows: int,
        window: int,
        mixing: Mixing | None = None,
    ) -> None:
        """`window`: samples read ahead. `mixing`: how the rows are mixed in pairs, if they are."""
        self.rows, self.counters = rows, Counters()
        self._index, self._transform, self._options, self._mixing = index, transform, options, mixing
        workers, floats = options.workers, options.floats
        size = transform.image_size
        grey = torch.tensor(GREY, dtype=torch.uint8)
        self._grey = to_float(grey, torch.float32) if floats else grey
        self._buffers = Buffers(rows, transform.channels, size, torch.float32 if floats else torch.uint8, options.pin)
        self._stripe = max(1, min(_STRIPE, rows // (2 * workers)))
        self.ahead = max(_AHEAD, -(-2 * workers * self._stripe // rows))
        self._pending: deque[_Pending] = deque()
        self._closed = False
        self._stopped_by: ChunkError | None = None  # why nothing is read any more
        self._error: BaseException | None = None
        self._threads = _decode_threads(workers)
        self._reader = Reader(index, plans, window, options.read_ahead, self.counters, options.timeouts)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

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
            wait(pending.stripes)  # wakes this thread once, not for each of them
            faults = dict(fault for stripe in pending.stripes for fault in stripe.result())
            if self._closed:  # by another thread, so that rows which were not begun are grey
                raise RuntimeError("the stream was closed while a batch of it was waited for")
        except BaseException as error:
            self._error = error
            self.close()
            raise
        ids = pending.plan.ids
        valid = torch.from_numpy(ids >= 0)
        valid[list(faults)] = False
        weight = boxes = None
        if self._mixing:
            weight, boxes = keep_whole(*self._mixing.draw(pending.plan.epochs, ids), valid)
        batch = Batch(
            pending.images, self._labels(ids), ids, valid, weight, boxes, tuple(faults.values()), tuple(pending.keys)
        )
        return batch.pinned() if self._options.pin else batch

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
        # The reader first: decode threads may be waiting for it.
        self._reader.close()
        self._threads.shutdown()

    def _fill(self) -> None:
        """Hand micro-batches to the decode threads until enough are under way, each in a buffer of its own."""
        while len(self._pending) < self.ahead and (plan := next(self._reader, None)) is not None:
            pending = _Pending(plan, self._buffers.take(), [], [None] * self.rows)
            for first in range(0, self.rows, self._stripe):
                rows = range(first, min(first + self._stripe, self.rows))
                pending.stripes.append(self._threads.submit(self._decode, pending, rows))
            self._pending.append(pending)

    def _decode(self, pending: _Pending, rows: range) -> list[tuple[int, Fault]]:
        """Fill some rows of a buffer. Returns the rows that stay grey because of a fault, and the faults."""
        plan, buffer, laps = pending.plan, pending.images, Laps()
        faults: list[tuple[int, Fault]] = []
        filled: set[int] = set()
        for row, key, data in self._take(plan, rows, faults):
            laps.lap("starved_seconds")
            if self._closed:
                break
            sample_id, epoch = int(plan.ids[row]), int(plan.epochs[row])
            pending.keys[row] = key
            try:
                image = decode(data, self._transform.channels)
            except UnreadableImage as error:
                faults.append((row, Fault(sample_id, epoch, key, str(error))))
                continue
            finally:
                laps.lap("decode_seconds")
            image = self._transform(image, epoch, sample_id)
            laps.lap("augment_seconds")
            written = buffer[row].copy_(image)
            if written.is_floating_point():
                to_unit_(written)
            filled.add(row)
            laps.lap("collate_seconds")
        # A faulty sample keeps its place: to skip it would shift the order of all that follows.
        for row in {*rows} - filled:
            buffer[row] = self._grey
        padding = sum(plan.chunks[row] is None for row in rows)
        self.counters.add(images=len(rows) - padding, unreadable=len(faults), **laps.spent)
        return sorted(faults, key=lambda fault: fault[0])

    def _take(self, plan: Plan, rows: range, faults: list[tuple[int, Fault]]) -> Iterator[tuple[int, str, Encoded]]:
        """Row, key and encoded image of the samples that can be had; the others are added to `faults`."""
        for row in rows:
            chunk, sample_id = plan.chunks[row], int(plan.ids[row])
            if chunk is None or self._closed:
                continue
            try:
                key, data = chunk.take(sample_id)
            except ChunkError as error:
                cause = self._stopped_by
                if cause is not None and str(error) == NOT_READ:
                    error = ChunkError(f"{NOT_READ}: {cause}", cause.passing)
                elif error.passing or self._options.unreadable_chunks == "stop":
                    self._stopped_by = cause or error.with_traceback(None)
                    self._reader.stop()
                if self._options.unreadable_chunks == "raise":
                    raise error from None
                faults.append((row, Fault(sample_id, int(plan.epochs[row]), None, str(error), error.passing)))
                continue
            yield row, key, data

    def _labels(self, ids: NDArray[np.int64]) -> Tensor:
        real = ids >= 0
        found = self._index.labels(ids[real])
        labels = np.full((len(ids), found.shape[1]), -1, np.int64)
        labels[real] = found
        return torch.from_numpy(labels)


class TrainLoader(BatchStream):
    """A rank's micro-batches of steps start_step <= t < stop_step (None: without end), in slot order.

    Rank r owns slots [r·B/world, (r+1)·B/world) of every step. The transform sees a sample's image, epoch and id
    alone, so the global batch is the same for any world, micro_batch and workers.
    `trained`: the canonical ids that the order is of, ascending; None: all of the index.

    Raises InputError where the batch does not divide, or the order is for another number of samples.
    """

    def __init__(
        self,
        index: Index,
        order: Order,
        transform: Transform,
        options: LoaderOptions,
        *,
        micro_batch: int,
        start_step: int = 0,
        stop_step: int | None = None,
        mixing: Mixing | None = None,
        trained: NDArray[np.int64] | None = None,
    ) -> None:
        rank, world, batch = options.rank, options.world, order.global_batch
        if micro_batch < 1 or batch % (world * micro_batch):
            raise InputError(
                f"train.global_batch is {batch}, train.micro_batch {micro_batch}; a multiple of {world} ranks × the "
                "micro-batch would be right"
            )
        if order.samples != (samples := index.samples if trained is None else len(trained)):
            what = "the index holds" if trained is None else "to be trained on are"
            raise InputError(f"the order is for {order.samples} samples, {what} {samples}")
        super().__init__(
            index,
            plan_training(order, micro_batch, rank, world, start_step, stop_step, trained),
            transform,
            options,
            rows=micro_batch,
            # One chunk a lane, and half a chunk more: the lane that changes last has its next one in time.
            window=-(-3 * order.lane_count * order.chunk // (2 * world)),
            mixing=mixing,
        )


def evaluation_batches(
    index: Index,
    transform: Transform,
    options: LoaderOptions,
    *,
    batch: int,
    ids: Sequence[int] | NDArray[np.int64] | None = None,
) -> BatchStream:
    """Every sample of `ids` (default: of the index) once over all ranks, in the order given.

    Step t of rank r holds run t·world + r of `batch` ids: the batches, by step and then by rank, are `ids`.
    Every rank gets the same number of batches; rows beyond the end are padding, valid False. Transforms are
    called with epoch 0. Raises InputError for an id outside the index.
    """
    chosen = np.arange(index.samples) if ids is None else np.asarray(ids, np.int64).reshape(-1)
    wrong = chosen[(chosen < 0) | (chosen >= index.samples)]
    if len(wrong):
        raise InputError(f"sample {wrong[0]} is not in the index, whose ids are 0 to {index.samples - 1}")
    plans = plan_evaluation(chosen, batch, options.rank, options.world)
    return BatchStream(index, plans, transform, options, rows=batch, window=batch)


def _decode_threads(workers: int) -> ThreadPoolExecutor:
    """Threads that decode, in which torch starts no threads of its own."""
    # torch.set_num_threads() holds for the calling thread and for any that asks for the first time later. So each of
    # these asks before it sets its own number, and the caller then sets its own again.
    own = torch.get_num_threads()
    started = threading.Barrier(workers + 1)
    failed: list[BaseException] = []

    def prepare_thread() -> None:
        try:
            torch.get_num_threads()
            torch.set_num_threads(1)
        except BaseException as error:
            failed.append(error)
            started.abort()
            raise

    threads = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=prepare_thread)
    try:
        for _ in range(workers):
            threads.submit(started.wait)
        started.wait()
    except BaseException as error:
        started.abort()  # those that have been started would wait for one that could not be
        threads.shutdown(cancel_futures=True)
        raise (failed or [error])[0] from None
    finally:
        torch.set_num_threads(own)
    return threads
