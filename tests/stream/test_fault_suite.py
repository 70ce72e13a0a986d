"""The stream over a server that fails in every way it can, and over damaged shards: right, masked, or refused by name.

Never wrong and silent, and never for ever. Each case trains on the damaged set beside the whole one.
"""

import os
import shutil
import threading

import numpy as np
import pytest
import torch

import pretrain.storage.retry as retry
from pretrain.errors import InputError
from pretrain.images.transforms import TrainImages
from pretrain.index.index import Index
from pretrain.shards.scan import index_shards
from pretrain.stream.fault import NOT_READ, first_fault
from pretrain.stream.loader import LoaderOptions, TrainLoader
from pretrain.stream.order import Order

STEPS, BATCH = 12, 16
IMAGES = TrainImages(8, 3, seed=2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    timeouts = retry.Timeouts(connect=1, stall=0.5, deadline=4, first_backoff=0.01, most_backoff=0.05)
    monkeypatch.setattr(retry, "TIMEOUTS", timeouts)
    monkeypatch.setattr("pretrain.stream.reader._CLOSING", 0.3)


def batches(index, unreadable="mask", timeouts=None):
    order = Order(index.samples, BATCH, seed=2)
    options = LoaderOptions(workers=2, unreadable_chunks=unreadable, timeouts=timeouts)
    with TrainLoader(index, order, IMAGES, options, micro_batch=BATCH, stop_step=STEPS) as loader:
        return list(loader)


def in_time(work, seconds=60):
    """What `work` returns; a failure, not a hang, if that takes longer."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs, or it raised"
    return found[0]


def lost(damaged, whole):
    """Ids that came grey, masked and named; every other sample must be the one of the whole set, to the pixel."""
    missing = set()
    for batch, other in zip(damaged, whole, strict=True):
        assert np.array_equal(batch.ids, other.ids)
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.images[batch.valid], other.images[batch.valid])
        assert [fault.sample_id for fault in batch.faults] == batch.ids[~batch.valid.numpy()].tolist()
        missing |= {fault.sample_id for fault in batch.faults}
    return missing


@pytest.fixture
def remote(serve, write_shards, tmp_path):
    """(server, the index of its shards over http, the same shards' batches read from the disk)."""
    shards = write_shards("set", [60, 43])
    server = serve(shards.folder)
    urls = [f"{server.http}/shard-{number:03d}.tar" for number in range(2)]
    index = Index.open(index_shards(urls, tmp_path / "remote.vfi", workers=1))
    whole = batches(shards.index)
    server.requests.clear()
    return server, index, whole


def test_after_the_first_chunk_that_cannot_be_read_a_run_that_ends_for_it_waits_for_no_other(remote):
    server, index, _ = remote
    server.named = {"shard-000.tar": 404, "shard-001.tar": "stall first"}
    timeouts = retry.Timeouts(stall=20, deadline=200)
    found = in_time(lambda: batches(index, "stop", timeouts), seconds=15)
    faults = [fault for batch in found for fault in batch.faults]
    assert len(faults) == STEPS * BATCH
    assert all("404 Not Found" in fault.reason for fault in faults if fault.reason != NOT_READ)
    assert "404 Not Found" in first_fault(faults).reason
    assert not first_fault(faults).passing


def test_storage_that_does_not_answer_is_waited_for_once_also_where_chunks_are_quarantined(remote, monkeypatch):
    server, index, _ = remote
    monkeypatch.setattr("pretrain.stream.reader.REMOTE_THREADS", 1)  # of 13 chunks, each for 2 s: one after the other
    server.usual = 503
    timeouts = retry.Timeouts(deadline=2, first_backoff=0.01, most_backoff=0.05)
    found = in_time(lambda: batches(index, "mask", timeouts), seconds=12)
    faults = [fault for batch in found for fault in batch.faults]
    assert len(faults) == STEPS * BATCH
    assert all(fault.passing for fault in faults)
    assert first_fault(faults).reason.startswith(server.http)


@pytest.mark.parametrize(
    "faults",
    [
        [503] * 9,
        [500, 502, 504, 429, 408],
        ["reset"] * 9,
        ["short", "cut"] * 4,
        ["stall", "stall first"],
        ["reset", 503, "short", 429, "stall", "cut", 500] * 3,
    ],
    ids=str,
)
def test_a_server_that_fails_and_recovers_is_not_noticed(remote, faults):
    server, index, whole = remote
    server.faults.extend(faults)
    assert lost(in_time(lambda: batches(index)), whole) == set()
    assert not server.faults


@pytest.mark.parametrize(
    ("usual", "found"),
    [
        (503, "503"),
        (404, "404"),
        (403, "403"),
        ("stall first", "timed out; given up after"),
        ("whole", "range"),
        ("shifted", "the server answered with other bytes"),
        ("new etag", "changed"),
    ],
)
def test_a_server_that_stays_broken_is_named_and_its_samples_masked(remote, usual, found):
    server, index, whole = remote
    server.usual = usual
    timeouts = retry.Timeouts(connect=1, stall=0.3, deadline=1, first_backoff=0.01, most_backoff=0.05)
    damaged = in_time(lambda: batches(index, timeouts=timeouts))
    assert lost(damaged, whole) == {u for batch in whole for u in batch.ids.tolist()}
    for batch in damaged:
        assert all(server.http in fault.reason and fault.of_chunk for fault in batch.faults)
        assert any(found in fault.reason for fault in batch.faults), batch.faults[0].reason
    with pytest.raises(InputError, match=server.http):
        batches(index, "raise", timeouts)


def test_a_shard_replaced_under_a_run_is_refused_by_its_etag(remote, write_shards):
    server, index, whole = remote
    other = write_shards("other", [60, 43], labels=lambda u: u % 5)
    shutil.copy(other.shard(1), server.folder / "shard-001.tar")
    damaged = in_time(lambda: batches(index))
    seen = {u for batch in whole for u in batch.ids.tolist()}
    chunks_of_it = {u for u in seen if u // 8 * 8 + 8 > 60}
    assert lost(damaged, whole) == chunks_of_it
    assert all("changed" in fault.reason for batch in damaged for fault in batch.faults)


@pytest.mark.parametrize("cut", ["header", "data", "between members", "between samples"])
def test_a_tar_cut_after_it_was_indexed_loses_just_the_chunks_beyond(write_shards, cut):
    whole, damaged = write_shards("whole", [60, 43]), write_shards("cut", [60, 43])
    index = damaged.index
    (place,) = index.extents([80])
    data = damaged.shard(1).read_bytes()
    image_ends = place.begin + 512 + -(-int(data[place.begin + 124 : place.begin + 135], 8) // 512) * 512
    at = {
        "header": place.begin + 100,
        "data": place.begin + 600,
        "between members": image_ends,
        "between samples": place.begin,
    }[cut]
    os.truncate(damaged.shard(1), at)
    # A chunk is whole or not there: samples 72 to 79 are one, 80 begins the next.
    seen = {u for batch in batches(whole.index) for u in batch.ids.tolist()}
    found = in_time(lambda: batches(index))
    assert lost(found, batches(whole.index)) == {u for u in seen if u >= 80}
    assert all("truncated" in fault.reason for batch in found for fault in batch.faults)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_or_giant_image_is_masked_alone(write_shards, encoded, kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(noise, kind)
    giant = bytearray(encoded(noise, "PNG"))
    giant[16:24] = (100_000).to_bytes(4, "big") * 2  # 10¹⁰ pixels, declared in a few hundred bytes
    whole = write_shards("whole", [60])
    bad = {3: data[: len(data) // 2], 20: data[:10], 31: b"", 44: bytes(giant)}
    damaged = write_shards("damaged", [60], replace=bad)
    found = in_time(lambda: batches(damaged.index))
    seen = {u for batch in found for u in batch.ids.tolist()}
    assert lost(found, batches(whole.index)) == set(bad) & seen == set(bad)
    assert not any(fault.of_chunk for batch in found for fault in batch.faults)


@pytest.mark.parametrize("silence", [503, "stall first", "stall"])
def test_closing_does_not_wait_for_a_server_that_is_silent(remote, monkeypatch, silence):
    server, index, _ = remote
    monkeypatch.setattr(retry, "TIMEOUTS", retry.Timeouts(connect=1, stall=20, deadline=60))
    server.usual = silence
    order = Order(index.samples, BATCH, seed=2)
    loader = TrainLoader(index, order, IMAGES, LoaderOptions(workers=2), micro_batch=BATCH)
    assert in_time(lambda: loader.close() or True, seconds=5)
