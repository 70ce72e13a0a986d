"""What ranks of a large run do with data and files, rank by rank, by the run's own code. No image is read."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from pretrain import hostmemory
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint import pieces
from pretrain.checkpoint.step import Checkpoint
from pretrain.index.index import Index
from pretrain.ranks.launcher import free_port
from pretrain.record.folder import RunFolder
from pretrain.record.ledger import Audit
from pretrain.stream.chunk import Chunk
from pretrain.stream.counters import Counters
from pretrain.stream.order import Order
from pretrain.stream.plan import plan_training
from pretrain.stream.reader import Reader


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def start_checks(path: Path) -> dict[str, float]:
    """Seconds of what a start does with an index before it trains, and bytes of memory; for a fresh process.

    Requests for shards are counted, not made.
    """
    before = hostmemory.resident_memory()
    found: dict[str, float] = {}
    began = time.perf_counter()
    index = Index.open(path)
    index.extents([index.samples - 1])
    found["open"] = time.perf_counter() - began
    found["memory_opened"] = hostmemory.resident_memory() - before
    asked: list[object] = []
    with mock.patch("pretrain.index.index._shard_fault", lambda shard, *_: asked.append(shard)):
        found["files"] = seconds(lambda: index.check_files(local=0, remote=64))
    found["requests"] = len(asked)
    found["content"] = seconds(index.check_content)  # one rank a host; the others wait
    found["distinct"] = seconds(index.check_distinct)
    found["histogram"] = seconds(index.histogram)  # rank 0
    found["unhashed"] = seconds(index.unhashed)  # rank 0
    found["memory_checked"] = hostmemory.resident_memory() - before  # with the index's own pages, which ranks share
    return found


def resume_seconds(order: Order, ranks: int, part: float) -> float:
    """From nothing to the plan of rank 0's first step at that part of the first epoch."""
    step = int(part * order.samples / order.global_batch)
    plans = plan_training(order, order.global_batch // ranks, 0, ranks, step, None)
    return seconds(lambda: next(plans))


def order_seconds(order: Order, ranks: int) -> float:
    """One rank's ids of a step, the median of several; it plans many steps at a time."""
    share = order.global_batch // ranks
    many = max(4096 // share, 1)
    at = range(0, 20 * many, many)
    return statistics.median(
        seconds(lambda step=step: [order.ids(step + n, 0, share) for n in range(4)]) / 4 for step in at
    )


@dataclass(frozen=True)
class Reads:
    """What all ranks ask of storage in a window of steps, as the loader's own reader asks."""

    requests_per_image: float
    amplification: float  # bytes asked for ÷ bytes of the samples that are trained on
    ranks_uneven: float  # most ÷ mean bytes of a rank over the window
    steps_uneven: float  # most ÷ mean bytes of a step over all ranks, once reading is ahead
    first_bytes: float  # that a rank asks for before its first step
    open_chunks: int  # of a rank, at the most
    held_bytes: float  # of encoded samples that a rank holds, read ahead or open, at the most
    shards_at_once: int  # distinct ones that all ranks read from in one step


class _Counted:
    """What was asked for."""

    def __init__(self) -> None:
        self.requests, self.bytes, self.shards = 0, 0, set[str]()


def reads(order: Order, index: Index, ranks: int, budget: int, lives: int = 4) -> Reads:
    """Drive each rank's reader through the window in which every lane reads `lives` chunks.

    Args:
        budget: bytes that a rank reads ahead at the most (`data.read_ahead_mib`).
    """
    share = order.global_batch // ranks
    life = max(order.lane_count * order.chunk // order.global_batch, 1)
    start, steps = life * (order.samples // order.global_batch // life // 2), lives * life
    by_rank, by_step = np.zeros(ranks), np.zeros(steps)
    total = _Counted()
    used = first = 0.0
    opened = held_most = 0.0
    shards: list[set[str]] = [set() for _ in range(steps)]
    window = -(-3 * order.lane_count * order.chunk // (2 * ranks))  # as TrainLoader's
    locate = Chunk.locate
    for rank in range(ranks):
        now = _Counted()

        def counted(chunk: Chunk, of: Index, reader: Any, now: _Counted = now) -> None:
            locate(chunk, of, reader)
            now.requests += len(chunk._extents)
            now.bytes += chunk.bytes
            now.shards |= {extent.url for extent in chunk._extents}

        with (
            mock.patch.object(Chunk, "locate", counted),
            mock.patch.object(Chunk, "read"),
            mock.patch("pretrain.stream.reader.REMOTE_THREADS", 1),
        ):
            plans = plan_training(order, share, rank, ranks, start, start + steps)
            reader = Reader(index, plans, window, budget, Counters())
            left: dict[int, tuple[Chunk, int]] = {}
            consumed = 0.0
            for step, plan in enumerate(reader):
                if step == 0:
                    first = max(first, now.bytes)
                else:
                    by_step[step] += now.bytes
                    shards[step] |= now.shards
                by_rank[rank] += now.bytes
                total.requests += now.requests
                total.bytes += now.bytes
                now.requests, now.bytes, now.shards = 0, 0, set()
                for chunk in plan.chunks:
                    assert chunk is not None
                    consumed += chunk.bytes / len(chunk.ids)
                    uses = left.pop(id(chunk), (chunk, len(chunk.ids)))[1] - 1
                    if uses:
                        left[id(chunk)] = chunk, uses
                opened = max(opened, len(left))
                held_most = max(held_most, by_rank[rank] - consumed)
            reader.close()
        used += consumed
    settled = by_step[1 : steps - 2 * life] if steps > 2 * life + 1 else by_step[1:]
    return Reads(
        total.requests / (steps * order.global_batch),
        total.bytes / used,
        float(by_rank.max() / by_rank.mean()),
        float(settled.max() / settled.mean()),
        first,
        int(opened),
        held_most,
        max(map(len, shards)),
    )


def checkpoint_files(ranks: int, values: int = 4_000_000) -> dict[str, float]:
    """Files of a checkpoint that so many ranks write, seconds of each rank's for files alone, and of rank 0's for them.

    The network is small, so that what is measured is files, not bytes.
    """
    each = values // ranks
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        aside = checkpoints.partial_path(folder, 1)
        zeros = torch.zeros(each)
        named = {kind: [zeros] for kind in (pieces.WEIGHT, "exp_avg", "exp_avg_sq")}
        began = time.perf_counter()
        shares = [pieces.write_share(aside, rank, [("w", rank * each, each)], named, {"w": 0}) for rank in range(ranks)]
        written = (time.perf_counter() - began) / ranks
        began = time.perf_counter()
        path = checkpoints.commit(folder, 1, shares, {})
        committed = time.perf_counter() - began
        found = Checkpoint.read(path)
        listed = seconds(lambda: Checkpoint.read(path))
        count = len(list(path.iterdir()))
        state = (path / "state.json").stat().st_size
        assert found.state["ranks"] == ranks
    return {"files": count, "rank": written, "commit": committed, "read": listed, "state_bytes": state}


def audit_line_bytes(order: Order, ranks: int) -> float:
    """Bytes that a rank's audit grows by in a step, as it is written."""
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        audit = Audit(folder, 0, enabled=True)
        step = order.samples // order.global_batch
        for number in range(step, step + 10):
            audit.add(order.ids(number, 0, order.global_batch // ranks))
            audit.step(number)
        audit.close()
        return folder.audit(0).stat().st_size / 10


def store_requests_per_second() -> float:
    """What a store as that at which the ranks meet answers: 64 clients of one process ask it as fast as they can."""
    port = free_port()
    patience = timedelta(seconds=60)
    kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=patience)
    clients = [
        dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=patience) for _ in range(64)
    ]
    each = 200
    threads = [
        threading.Thread(target=lambda client=client: [client.check(["met"]) for _ in range(each)])
        for client in clients
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = each * len(clients) / (time.perf_counter() - began)
    del clients, kept
    return rate
