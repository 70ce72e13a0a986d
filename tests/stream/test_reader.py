"""Reading: exactly the samples a rank needs, ahead of their use, and every damage named."""

import io
import os
import tarfile
import threading

import numpy as np
import pytest
import webdataset

import pretrain.stream.reader as reader_module
from pretrain.errors import InputError
from pretrain.stream.index import Extent, Index
from pretrain.stream.order import Order
from pretrain.stream.reader import Chunk, Counters, Reader, plan_evaluation, plan_training, read_images
from pretrain.stream.scan import index_shards

ORDERS = [
    # samples, global batch, chunk, lanes
    (203, 16, 8, None),
    (203, 16, 8, 64),
    (203, 12, 5, 7),
    (1797, 32, 8, None),
    (5, 12, 8, None),
    (1, 4, 8, None),
    (40, 8, 1, 3),
]


def bytes_of(index, sample_id):
    return read_images(index, np.array([sample_id]))[sample_id]


# Chunks


def test_any_run_of_samples_reads_what_was_written(shards):
    index = shards.index
    for ids in (
        np.arange(8),
        np.arange(44, 56),
        np.arange(84, 92),
        np.array([0, 3, 4, 60, 202]),
        np.arange(203),
    ):
        images = read_images(index, ids)
        assert list(images) == ids.tolist()
        assert all(images[sample_id] == shards.images[sample_id] for sample_id in ids.tolist())


def test_long_names_and_pax_headers_belong_to_their_sample(tmp_path):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        folder = tmp_path / str(form)
        folder.mkdir()
        with tarfile.open(folder / "a.tar", "w", format=form) as tar:
            for number in range(20):
                for suffix, data in [("cls", b"1"), ("PNG", b"image %d" % number)]:
                    info = tarfile.TarInfo(f"{'x' * 150}/über-{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        index = Index.open(index_shards([folder], workers=1).parent)
        for sample_id in range(20):
            assert bytes_of(index, sample_id) == b"image %d" % sample_id


def fails_with(index, ids, *words):
    with pytest.raises(InputError) as caught:
        read_images(index, np.asarray(ids))
    assert caught.value.only_this_rank
    for word in words:
        assert word in str(caught.value)


def test_a_truncated_shard_names_the_byte_it_ends_at(write_shards):
    shards = write_shards("cut", [20, 20])
    index = shards.index
    (place,) = index.extents(np.array([27]))
    os.truncate(shards.shard(1), place.begin + 700)
    assert bytes_of(index, 26) == shards.images[26]
    fails_with(index, range(24, 32), str(shards.shard(1)), "truncated", f"ends at byte {place.begin + 700}")


def test_a_missing_shard_is_named(write_shards):
    shards = write_shards("gone", [20])
    index = shards.index
    shards.shard(0).unlink()
    fails_with(index, range(8), str(shards.shard(0)), "No such file")


@pytest.mark.parametrize("fill", [b"\0", b"\xa5"])
def test_a_header_overwritten_is_noticed_although_tarfile_ends_without_an_error(write_shards, fill):
    shards = write_shards("damaged", [20])
    index = shards.index
    (place,) = index.extents(np.array([4]))
    with open(shards.shard(0), "r+b") as file:
        file.seek(place.begin)
        file.write(fill * 512)
    fails_with(index, range(8), str(shards.shard(0)), "bytes 0-")
    fails_with(index, [4], f"bytes {place.begin}-{place.end}")


def test_samples_in_another_order_are_noticed(write_shards):
    shards = write_shards("swapped", [20])
    index = shards.index
    with open(shards.shard(0), "r+b") as file:
        data = bytearray(file.read())
        for sample_id, other in [(3, 5), (5, 3)]:
            (place,) = index.extents(np.array([sample_id]))
            at = place.begin
            while at < place.end:  # the names of all members, and the headers' checksums
                size = int(data[at + 124 : at + 135], 8)
                name = data[at : at + 100].replace(f"{sample_id:06d}".encode(), f"{other:06d}".encode())
                data[at : at + 100] = name
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
                at += 512 + -(-size // 512) * 512
        file.seek(0)
        file.write(data)
    fails_with(index, range(8), "sample 3 has key 'sample/000005'", "crc32")


def test_a_member_that_vanished_is_a_sample_too_few(write_shards):
    shards = write_shards("renamed", [20])
    index = shards.index
    data = shards.shard(0).read_bytes()
    at = data.index(b"sample/000002.webp")
    header = bytearray(data[at : at + 512])
    header[:18] = b"sample/000002.gif\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with open(shards.shard(0), "r+b") as file:
        file.seek(at)
        file.write(header)
    fails_with(index, [2], "0 samples with an image", "expects 1, ids 2 to 2")


# Doors that stay shut


@pytest.mark.parametrize("url", ["pipe:touch {}", "http://127.0.0.1:9/a.tar", "s3://bucket/a.tar", "file:///a.tar"])
def test_every_scheme_but_local_files_is_refused(tmp_path, url):
    class Elsewhere:
        def extents(self, ids):
            return [Extent(url.format(tmp_path / "made"), 0, 512, 0, 1)]

    fails_with(Elsewhere(), [0], "local")
    assert not (tmp_path / "made").exists()


def test_rewriting_of_urls_has_no_effect(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", f".*=pipe:touch {tmp_path / 'made'}; cat /dev/null #")
    assert bytes_of(shards.index, 0) == shards.images[0]
    assert not (tmp_path / "made").exists()


def test_the_opener_stands_in_the_table_of_webdataset(shards, monkeypatch):
    opened = []
    opener = webdataset.gopen_schemes["vfrange"]
    monkeypatch.setitem(webdataset.gopen_schemes, "vfrange", lambda url, mode: opened.append(url) or opener(url, mode))
    assert bytes_of(shards.index, 0) == shards.images[0]
    (place,) = shards.index.extents(np.array([0]))
    assert opened == [f"vfrange:{place.begin}-{place.end}:{shards.shard(0)}"]


def test_pickled_members_are_never_opened(tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "a.tar")) as tar:
        tar.write(
            {
                "__key__": "a",
                "png": b"image",
                "cls": b"1",
                "pyd": b"cos\nsystem\n(S'exit 1'\ntR.",
                "jpg.gz": b"\x1f\x8b",
            }
        )
    index = Index.open(index_shards([folder], workers=1).parent)
    assert read_images(index, np.array([0])) == {0: b"image"}


# Plans


@pytest.fixture(params=[24, 4096])
def planned_at_once(request, monkeypatch):
    """How many positions are planned together: chunks go on from one such block to the next, or not."""
    monkeypatch.setattr(reader_module, "_PLANNED_AT_ONCE", request.param)


@pytest.mark.usefixtures("planned_at_once")
@pytest.mark.parametrize(("samples", "batch", "chunk", "lanes"), ORDERS)
@pytest.mark.parametrize("world", [1, 4])
def test_a_plan_is_the_ranks_part_of_the_order(samples, batch, chunk, lanes, world):
    order = Order(samples, batch, seed=3, chunk=chunk, lanes=lanes)
    share = batch // world
    for rank in {0, world - 1}:
        for micro in {1, share}:
            plans = list(plan_training(order, micro, rank, world, 5, 25))
            ids = np.concatenate([plan.ids for plan in plans])
            epochs = np.concatenate([plan.epochs for plan in plans])
            begin, end = rank * share, (rank + 1) * share
            assert ids.tolist() == [u for step in range(5, 25) for u in order.ids(step, begin, end)]
            assert epochs.tolist() == [e for step in range(5, 25) for e in order.epochs(step, begin, end)]
            assert all(len(plan.ids) == micro for plan in plans)


@pytest.mark.usefixtures("planned_at_once")
@pytest.mark.parametrize(("samples", "batch", "chunk", "lanes"), ORDERS)
@pytest.mark.parametrize("world", [1, 2])
def test_each_chunk_is_read_once_and_holds_just_what_the_rank_takes_from_it(samples, batch, chunk, lanes, world):
    order = Order(samples, batch, seed=3, chunk=chunk, lanes=lanes)
    for rank in range(world):
        opened, uses = [], {}
        for plan in plan_training(order, 1, rank, world, 5, 40):
            opened += plan.fresh
            (taken,) = plan.chunks
            assert any(taken is known for known in opened), "a chunk is opened before it is used"
            uses.setdefault(id(taken), []).append(int(plan.ids[0]))
        assert len({id(fresh) for fresh in opened}) == len(opened)
        for fresh in opened:
            assert fresh.ids.tolist() == sorted(uses[id(fresh)])
        whole = [fresh for fresh in opened if len(fresh.ids) == chunk]
        if lanes is None and samples > 1000 and world == 1:
            assert len(whole) > 0.7 * len(opened)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 11, 12, 13, 100])
def test_an_evaluation_takes_every_id_once_and_each_rank_as_many_batches(world, count):
    ids = np.random.default_rng(0).permutation(200)[:count]
    plans = [list(plan_evaluation(ids, 4, rank, world)) for rank in range(world)]
    assert len({len(of_rank) for of_rank in plans}) == 1
    in_order = [plan for step in zip(*plans, strict=True) for plan in step]
    rows = [int(u) for plan in in_order for u in plan.ids]
    assert rows == ids.tolist() + [-1] * (len(rows) - count)
    assert len(rows) - count < 4 * world
    for plan in in_order:
        assert [chunk is None for chunk in plan.chunks] == (plan.ids < 0).tolist()
        assert [u for chunk in plan.fresh for u in chunk.ids] == plan.ids[plan.ids >= 0].tolist()


# Reading ahead


@pytest.fixture
def reads(monkeypatch):
    """The ids of each read, as it is made."""
    made = []

    def read(index, ids):
        made.append(ids)
        return read_images(index, ids)

    monkeypatch.setattr(reader_module, "read_images", read)
    return made


@pytest.mark.parametrize("world", [1, 2])
def test_reading_stays_a_window_ahead_and_is_even(shards, reads, monkeypatch, world):
    monkeypatch.setattr(reader_module, "READ_THREADS", 1)  # reads are done in the order they are started
    order, rows = Order(203, 8, seed=1, chunk=4), 8 // world
    window = 3 * order.lane_count * 4 // 2 // world
    total = 60 * rows
    counters = Counters()
    reader = Reader(shards.index, plan_training(order, rows, 0, world, 0, 60), window, counters)
    done = []
    for number, plan in enumerate(reader, 1):
        for sample_id, chunk in zip(plan.ids, plan.chunks, strict=True):
            assert chunk.take(int(sample_id)) == shards.images[sample_id]
        reader._threads.submit(int).result()
        done.append(sum(len(ids) for ids in reads))
        assert min(total, number * rows + window) <= done[-1] < number * rows + window + 4
    reader.close()
    assert done[-1] == total
    assert counters.bytes_read == sum(len(shards.images[u]) for ids in reads for u in ids)
    # All lanes ask for their next chunks in one step; what is read from step to step is even.
    assert np.diff(done[:40]).max() <= rows + 4


def test_what_is_asked_for_is_started_although_the_window_is_shut(shards):
    order = Order(203, 16, seed=1)
    reader = Reader(shards.index, plan_training(order, 16, 0, 1, 0, 30), 0, Counters())
    for plan in reader:
        assert all(not chunk.waiting for chunk in plan.chunks)
        for sample_id, chunk in zip(plan.ids, plan.chunks, strict=True):
            assert chunk.take(int(sample_id)) == shards.images[sample_id]
    reader.close()


def test_a_sample_is_let_go_once_it_is_taken(shards):
    reader = Reader(shards.index, plan_evaluation(np.arange(4), 4, 0, 1), 4, Counters())
    plan = next(reader)
    chunk = plan.chunks[0]
    assert isinstance(chunk, Chunk)
    chunk.take(1)
    assert sorted(chunk._images.result()) == [0, 2, 3]
    reader.close()


def test_closing_drops_what_is_queued_and_leaves_no_thread(shards, monkeypatch):
    gate = threading.Event()

    def slow(index, ids):
        gate.wait(10)
        return read_images(index, ids)

    monkeypatch.setattr(reader_module, "read_images", slow)
    reader = Reader(shards.index, plan_training(Order(203, 16, seed=1), 16, 0, 1, 0, 30), 200, Counters())
    plan = next(reader)
    threading.Timer(0.2, gate.set).start()
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read")]
    assert any(chunk._images.cancelled() for chunk in plan.fresh)
