"""Reading ahead: as far as window and budget go, evenly, and nothing left behind."""

import threading

import numpy as np
import pytest

import pretrain.stream.reader as reader_module
from pretrain.storage.shardfile import ShardReader
from pretrain.stream.chunk import Chunk
from pretrain.stream.counters import Counters
from pretrain.stream.fault import NOT_READ, ChunkError
from pretrain.stream.order import Order
from pretrain.stream.plan import plan_evaluation, plan_training
from pretrain.stream.reader import READ_AHEAD, Reader


@pytest.fixture
def reads(monkeypatch):
    """The ids of each read, as it is made."""
    made = []

    def read(self, extent, real=ShardReader.read):
        made.append(list(range(extent.first_id, extent.first_id + extent.count)))
        return real(self, extent)

    monkeypatch.setattr(ShardReader, "read", read)
    return made


def size_of(index, ids):
    return sum(extent.end - extent.begin for extent in index.extents(np.asarray(ids)))


@pytest.mark.parametrize("world", [1, 2])
def test_reading_stays_a_window_ahead_and_is_even(shards, reads, monkeypatch, world):
    monkeypatch.setattr(reader_module, "LOCAL_THREADS", 1)  # reads are done in the order they are started
    order, rows = Order(203, 8, seed=1, chunk=4), 8 // world
    window = 3 * order.lane_count * 4 // 2 // world
    total = 60 * rows
    counters = Counters()
    reader = Reader(shards.index, plan_training(order, rows, 0, world, 0, 60), window, READ_AHEAD, counters)
    done = []
    for number, plan in enumerate(reader, 1):
        for sample_id, chunk in zip(plan.ids, plan.chunks, strict=True):
            assert chunk.take(int(sample_id)) == (shards.keys[sample_id], shards.images[sample_id])
        reader._threads.submit(int).result()
        done.append(sum(len(ids) for ids in reads))
        assert min(total, number * rows + window) <= done[-1] < number * rows + window + 4
    reader.close()
    assert done[-1] == total
    assert counters.bytes_read == sum(size_of(shards.index, ids) for ids in reads)
    # All lanes ask for their next chunks in one step; what is read from step to step is even.
    assert np.diff(done[:40]).max() <= rows + 4


@pytest.mark.parametrize("chunks", [1, 6])
def test_reading_ahead_stays_within_its_bytes(shards, reads, monkeypatch, chunks):
    monkeypatch.setattr(reader_module, "LOCAL_THREADS", 1)
    order = Order(203, 8, seed=1, chunk=4)
    largest = max(size_of(shards.index, range(u, u + 4)) for u in range(0, 200, 4))
    budget = chunks * largest
    reader = Reader(shards.index, plan_training(order, 8, 0, 1, 0, 60), 10_000, budget, Counters())
    asked = 0.0
    for plan in reader:
        reader._threads.submit(int).result()
        for sample_id, chunk in zip(plan.ids, plan.chunks, strict=True):
            chunk.take(int(sample_id))
        asked += sum(chunk.bytes / len(chunk.ids) for chunk in plan.chunks)
        # Beyond what was asked for: the budget and the chunk that reached it; or, with a budget so small that it holds
        # less than a chunk a lane, the rest of the chunks that were asked for.
        assert sum(size_of(shards.index, ids) for ids in reads) - asked <= budget + (1 if chunks > 1 else 8) * largest
    reader.close()


def test_what_is_asked_for_is_started_although_the_window_is_shut(shards):
    order = Order(203, 16, seed=1)
    reader = Reader(shards.index, plan_training(order, 16, 0, 1, 0, 30), 0, READ_AHEAD, Counters())
    for plan in reader:
        assert all(chunk.located for chunk in plan.chunks)
        for sample_id, chunk in zip(plan.ids, plan.chunks, strict=True):
            assert chunk.take(int(sample_id)) == (shards.keys[sample_id], shards.images[sample_id])
    reader.close()


def test_a_sample_is_let_go_once_it_is_taken(shards):
    reader = Reader(shards.index, plan_evaluation(np.arange(4), 4, 0, 1), 4, READ_AHEAD, Counters())
    plan = next(reader)
    chunk = plan.chunks[0]
    assert isinstance(chunk, Chunk)
    chunk.take(1)
    assert sorted(chunk._samples) == [0, 2, 3]
    reader.close()


def test_closing_drops_what_is_queued_and_leaves_no_thread(shards, monkeypatch):
    gate = threading.Event()

    def slow(self, extent, real=ShardReader.read):
        gate.wait(10)
        return real(self, extent)

    monkeypatch.setattr(ShardReader, "read", slow)
    reader = Reader(shards.index, plan_training(Order(203, 16, seed=1), 16, 0, 1, 0, 30), 200, READ_AHEAD, Counters())
    plan = next(reader)
    threading.Timer(0.2, gate.set).start()
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]
    last = plan.fresh[-1]
    with pytest.raises(ChunkError, match=NOT_READ):
        last.take(int(last.ids[0]))
