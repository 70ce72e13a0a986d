"""A chunk: exactly the samples asked for, and every damage named."""

import builtins
import errno
import io
import os
import re
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.shards.scan import index_shards
from pretrain.storage.shardfile import ShardReader
from pretrain.stream.chunk import Chunk
from pretrain.stream.counters import Counters
from pretrain.stream.fault import NOT_READ, ChunkError


def images_of(index, ids):
    chunk = Chunk(np.asarray(ids))
    chunk.locate(index, ShardReader())
    chunk.read(Counters())
    return {sample_id: chunk.take(sample_id)[1] for sample_id in chunk.ids.tolist()}


def bytes_of(index, sample_id):
    return images_of(index, [sample_id])[sample_id]


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
        images = images_of(index, ids)
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
        images_of(index, ids)
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


def test_a_shard_that_cannot_be_opened_for_a_while_is_outlasted_too(write_shards, monkeypatch):
    shards = write_shards("flaky", [20])
    index, failures = shards.index, [errno.ESTALE, errno.ETIMEDOUT]

    def fails(path, *args, real=open, **options):
        if failures and str(path).endswith(".tar"):
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", fails)
    monkeypatch.setattr("pretrain.storage.shardfile._PAUSES", (0.01, 0.01, 0.01))
    assert bytes_of(index, 3) == shards.images[3]
    assert not failures


def test_a_shard_that_has_grown_is_another_one(write_shards):
    shards = write_shards("grown", [20])
    index = shards.index
    with shards.shard(0).open("ab") as file:
        file.write(bytes(10_240))
    fails_with(index, range(8), str(shards.shard(0)), "changed since it was indexed")


def test_what_nobody_foresaw_is_told_with_the_shard(write_shards, monkeypatch):
    monkeypatch.setattr(ShardReader, "read", lambda self, extent: 1 / 0)
    with pytest.raises(ChunkError, match=r"shard-000\.tar: bytes 0-\d+: ZeroDivisionError"):
        images_of(write_shards("odd", [20]).index, range(8))


def test_a_local_read_that_fails_for_a_while_is_outlasted_and_one_that_stays_broken_is_told(write_shards, monkeypatch):
    shards = write_shards("flaky", [20])
    index, failures = shards.index, [errno.EIO, errno.ESTALE]

    def fails(*args, read=os.preadv):
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return read(*args)

    monkeypatch.setattr(os, "preadv", fails)
    monkeypatch.setattr("pretrain.storage.shardfile._PAUSES", (0.01, 0.01, 0.01))
    assert bytes_of(index, 3) == shards.images[3]
    assert not failures
    failures += [errno.EIO] * 4
    fails_with(index, range(8), str(shards.shard(0)), "cannot be read: Input/output error")
    assert not failures, "four attempts"
    failures += [errno.ESTALE] * 4
    with pytest.raises(ChunkError, match="Stale file handle") as caught:
        images_of(index, range(8))
    assert caught.value.passing
    failures += [errno.EACCES] * 2
    fails_with(index, range(8), "cannot be read: Permission denied")
    assert len(failures) == 1, "no second attempt"


@pytest.mark.parametrize(
    "name", ["ESHUTDOWN", "EHOSTUNREACH", "ENETUNREACH", "ECONNRESET", "ECONNABORTED", "EREMOTEIO"]
)
def test_a_file_system_that_is_cut_off_may_come_back(write_shards, monkeypatch, name):
    code = getattr(errno, name, None)
    if code is None:
        pytest.skip(f"no {name} on this platform")
    index, failures = write_shards("cut off", [20]).index, [code] * 4

    def fails(*args):
        raise OSError(failures[0], os.strerror(failures.pop(0)))

    monkeypatch.setattr(os, "preadv", fails)
    monkeypatch.setattr("pretrain.storage.shardfile._PAUSES", (0.01, 0.01, 0.01))
    with pytest.raises(ChunkError, match=re.escape(os.strerror(code))) as caught:
        images_of(index, range(8))
    assert caught.value.passing
    assert not failures, "four attempts"


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
    for ids in (range(8), [4]):
        fails_with(index, ids, str(shards.shard(0)), f"bytes {place.begin}-{place.end}")
    assert images_of(index, [3, 5]) == {u: shards.images[u] for u in (3, 5)}, "its neighbours are whole"


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


def rename(shard, old, new):
    data = shard.read_bytes()
    at = data.index(old)
    header = bytearray(data[at : at + 512])
    header[: len(old) + 1] = new.ljust(len(old) + 1, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with open(shard, "r+b") as file:
        file.seek(at)
        file.write(header)


def test_a_member_that_vanished_is_a_sample_too_few(write_shards):
    shards = write_shards("renamed", [20])
    index = shards.index
    rename(shards.shard(0), b"sample/000002.webp", b"sample/000002.gif")
    fails_with(index, [2], "no image; the index expects that of sample 2")


def test_a_second_image_in_the_bytes_of_a_sample_is_told(write_shards):
    shards = write_shards("doubled", [20])
    index = shards.index
    rename(shards.shard(0), b"sample/000002.cls", b"sample/000002.png")
    fails_with(index, [2], "images of 'sample/000002', 'sample/000002'; the index expects that of sample 2")


def test_what_lies_with_the_memory_is_not_said_of_the_shard(write_shards, monkeypatch):
    def fails(data):
        raise MemoryError

    index = write_shards("short", [20]).index
    monkeypatch.setattr("pretrain.stream.chunk.plain_members", fails)
    with pytest.raises(MemoryError):
        images_of(index, [2])


def test_whoever_waits_gets_the_sample_asked_for_and_it_is_given_up_with_it(write_shards):
    shards = write_shards("shared", [20])
    chunk, counters, begun = Chunk(np.arange(8)), Counters(), threading.Barrier(9)
    chunk.locate(shards.index, ShardReader())

    def take(sample_id):
        begun.wait()
        return chunk.take(sample_id)

    with ThreadPoolExecutor(8) as threads:
        taken = [threads.submit(take, sample_id) for sample_id in range(8)]
        begun.wait()
        time.sleep(0.05)  # all wait for the reading
        chunk.read(counters)
        assert [future.result() for future in taken] == [(shards.keys[u], shards.images[u]) for u in range(8)]
    assert counters.bytes_read == chunk.bytes
    with pytest.raises(KeyError):
        chunk.take(0)


def test_once_reading_is_stopped_what_was_read_is_still_given_and_nothing_else_waited_for(write_shards, monkeypatch):
    shards = write_shards("stopped", [20])
    index, stop = shards.index, threading.Event()
    read, queued = Chunk(np.arange(8)), Chunk(np.arange(8, 16))
    for chunk in (read, queued):
        chunk.locate(index, ShardReader(stop=stop))
    read.read(Counters())
    monkeypatch.setattr("pretrain.stream.chunk._POLL", 0.05)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(queued.take, 8)
        time.sleep(0.2)
        assert not waiting.done()
        stop.set()
        with pytest.raises(ChunkError, match=NOT_READ):
            waiting.result(timeout=10)
    monkeypatch.setattr("pretrain.stream.chunk._POLL", 30.0)
    begun = time.monotonic()
    with pytest.raises(ChunkError, match=NOT_READ):
        queued.take(9)
    assert time.monotonic() - begun < 10
    assert [read.take(u) for u in (0, 1)] == [(shards.keys[u], shards.images[u]) for u in (0, 1)]
