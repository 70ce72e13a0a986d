"""Shards in object stores: indexed, checked and verified where they are, at the price of few requests."""

import io
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.datasets.dataset import Dataset, png
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME, etag_of
from pretrain.shards import scan
from pretrain.shards.scan import index_shards
from pretrain.shards.survey import locate
from pretrain.shards.verify import verify
from pretrain.shards.write import ShardLayout, write_shards
from pretrain.storage import retry, store
from pretrain.storage.location import expand
from pretrain.storage.shardfile import ShardReader
from tests.system.inprocess import run_here

KINDS = ("http", "s3", "gs")
NAMES = "shard-{000000..000004}.tar"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Five shards of 12 images, their classes named."""
    folder = tmp_path_factory.mktemp("built") / "train"
    labels = np.arange(60, dtype=np.int32) % 7
    names = tuple(f"class {label}" for label in range(7))
    picture = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    data = Dataset("set", "all", labels, None, names, "f", lambda row: ("png", png(picture[row])))
    write_shards(data, folder, ShardLayout(samples=12))
    return folder


@pytest.fixture
def server(serve, built):
    return serve(built.parent)


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(retry, "TIMEOUTS", retry.Timeouts(2, 2, 10, 0.01, 0.05))


def big_shard(path, samples, size, first=0):
    """A tar of `samples` images of `size` bytes, none of them decodable."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, first + samples):
            for suffix, data in (("cls", b"%d" % (number % 5)), ("jpg", bytes(size))):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_index_is_the_local_one_with_urls_and_etags(server, built, tmp_path, kind):
    root = f"{getattr(server, kind)}/train"
    remote = Index.open(index_shards([f"{root}/{NAMES}"], tmp_path / "remote.vfi"))
    local = Index.open(built)
    assert remote.hash == remote.sequence == local.sequence
    whole = Index.open(index_shards([f"{root}/{NAMES}"], tmp_path / "whole.vfi", content=True))
    assert whole.hash == local.hash
    assert [etag_of(shard.digest) for shard in whole.shards] == [etag_of(shard.digest) for shard in remote.shards]
    assert [shard.url for shard in remote.shards] == [f"{root}/shard-{number:06d}.tar" for number in range(5)]
    for shard, url in zip(remote.shards, (shard.url for shard in local.shards), strict=True):
        assert (shard.bytes, shard.data_end > 0) == (Path(url).stat().st_size, True)
        assert shard.digest == f"etag:{store.stat(shard.url).etag}"
    here, there = local.extents(np.arange(5, 30)), remote.extents(np.arange(5, 30))
    assert all(extent.etag and extent.etag == store.stat(extent.url).etag for extent in there)
    assert all(extent.etag == "" for extent in here)
    ranges = [list(map(ShardReader().read, extents)) for extents in (here, there)]
    assert ranges[0] == ranges[1]
    assert {**locate(remote, 37), "shard": ""} == {**locate(local, 37), "shard": ""}
    # A moved index leaves URLs as they are.
    shutil.move(tmp_path / "remote.vfi", tmp_path / "elsewhere")
    assert Index.open(tmp_path / "elsewhere").shards[4].url == f"{root}/shard-000004.tar"


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_folder_in_a_bucket_is_indexed_in_name_order(server, built, tmp_path, kind):
    root = f"{getattr(server, kind)}/train"
    for folder in (root, f"{root}/", f"{root}/*.tar", f"{root}/shard-*"):
        assert expand([folder]) == [f"{root}/shard-{number:06d}.tar" for number in range(5)]
    index_shards([root], tmp_path / "remote.vfi")
    assert Index.open(tmp_path / "remote.vfi").sequence == Index.open(built).sequence
    with pytest.raises(InputError, match=r"nothing: no \*\.tar in this folder"):
        expand([f"{getattr(server, kind)}/nothing"])
    with pytest.raises(InputError, match=r"/shard-\*9\.tar: no \*\.tar of this folder matches"):
        expand([f"{root}/shard-*9.tar"])


def test_what_cannot_be_named_is_refused(server, tmp_path):
    shard = f"{server.http}/train/shard-000000.tar"
    for patterns, found in (
        ([f"{server.http}/train/"], "a folder cannot be listed over http; name its shards"),
        ([shard, shard], "named twice"),
        ([f"{server.http}/{{0..3"], "broken brace pattern"),
        (["https://me:secret@host/{0..3}.tar"], "a user or password"),
        ([shard.replace("000000", "000009")], "404 Not Found"),
        ([f"{server.s3}/train/shard-000009.tar"], "404 Not Found"),
    ):
        with pytest.raises(InputError, match=found) as error:
            index_shards(patterns, tmp_path / "i.vfi")
        assert "secret" not in str(error.value)
    with pytest.raises(InputError, match="say where on a local disk their index goes: --out FILE"):
        index_shards([shard])
    with pytest.raises(InputError, match="only shards are read from a URL; copy it to a local disk"):
        index_shards([shard], "s3://bucket/train.vfi")
    with pytest.raises(InputError, match="only shards are read from a URL; copy it to a local disk"):
        Index.open(f"{server.s3}/train/{INDEX_NAME}")
    assert list(tmp_path.iterdir()) == []


def test_scanning_big_images_takes_a_small_request_a_sample(serve, tmp_path):
    (tmp_path / "o").mkdir()
    big_shard(tmp_path / "o" / "a.tar", 40, 300_000)
    server = serve(tmp_path / "o")
    index_shards([f"{server.http}/a.tar"], tmp_path / "i.vfi")
    # One to learn of the size, one a sample, one for the end.
    assert len(server.requests) <= 42
    assert server.sent <= 42 * (16 << 10)


def test_scanning_small_images_reads_on_in_large_ranges(serve, tmp_path):
    (tmp_path / "o").mkdir()
    big_shard(tmp_path / "o" / "a.tar", 400, 10_000)
    server = serve(tmp_path / "o")
    index_shards([f"{server.http}/a.tar"], tmp_path / "i.vfi")
    assert len(server.requests) < 20
    assert server.sent <= (tmp_path / "o" / "a.tar").stat().st_size


def test_threads_and_processes_find_what_one_thread_finds(serve, tmp_path, monkeypatch):
    (tmp_path / "o").mkdir()
    for number in range(40):
        big_shard(tmp_path / "o" / f"{number:02d}.tar", 8, 40_000, first=8 * number)
    server = serve(tmp_path / "o")
    server.latency = 0.02
    begin = time.monotonic()
    one = index_shards([f"{server.s3}/"], tmp_path / "one.vfi", workers=1)
    seconds = time.monotonic() - begin
    assert seconds < 40 * 9 * server.latency / 2  # requests one after another: 7.2 s
    monkeypatch.setattr(scan, "_REMOTE_THREADS", 4)  # several blocks of shards a process
    two = index_shards([f"{server.s3}/"], tmp_path / "two.vfi", workers=2)
    assert one.read_bytes() == two.read_bytes()
    assert Index.open(one).sequence == Index.open(index_shards([tmp_path / "o"])).sequence


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_fault_in_order_ends_a_scan_soon(serve, tmp_path, workers):
    (tmp_path / "o").mkdir()
    for number in range(12):
        big_shard(tmp_path / "o" / f"{number:02d}.tar", 60 if number > 5 else 2, 40_000, first=60 * number)
    with open(tmp_path / "o" / "03.tar", "r+b") as file:
        file.truncate(30_000)
    server = serve(tmp_path / "o")
    server.latency = 0.25  # a shard of 60 samples takes 15 s
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"03\.tar: truncated: 30000 bytes, cut in the data of member '000180\.jpg'"):
        index_shards([f"{server.http}/{{00..11}}.tar"], tmp_path / "i.vfi", workers=workers)
    assert time.monotonic() - begin < 10
    assert list(tmp_path.iterdir()) == [tmp_path / "o"]


def test_a_server_that_fails_now_and_then_changes_nothing(server, built, tmp_path, hasty):
    server.faults.extend([503, "reset", "short", 500, "cut", 429, "reset"])
    server.head_faults.extend([503, 500])
    index_shards([f"{server.http}/train/{NAMES}"], tmp_path / "i.vfi")
    assert Index.open(tmp_path / "i.vfi").sequence == Index.open(built).sequence


def test_a_shard_that_changes_under_the_scan_is_refused(server, tmp_path):
    server.faults.append("grown")
    with pytest.raises(InputError, match=r"shard-000000\.tar: changed while it was read"):
        index_shards([f"{server.http}/train/shard-000000.tar"], tmp_path / "i.vfi")


def test_local_shards_are_indexed_as_lying_under_a_url(server, built, tmp_path):
    for kind in KINDS:
        base = f"{getattr(server, kind)}/train/"
        path = index_shards([built], tmp_path / "up.vfi", base=base, content=kind == "s3" and None)
        index = Index.open(path)
        assert index.sequence == Index.open(built).sequence
        assert (index.hash == Index.open(built).hash) == (kind == "s3")
        assert index.classes == Index.open(built).classes
        assert [shard.url for shard in index.shards] == [f"{base}shard-{number:06d}.tar" for number in range(5)]
        assert index.shards[0].digest.startswith("sha256:") == (kind == "s3")
        index.check_files()
        assert verify(index, workers=1).samples == 60


def test_a_base_that_is_none_and_names_that_would_meet_are_refused(built, tmp_path):
    with pytest.raises(InputError, match=r"--base data/train: not a URL of a folder"):
        index_shards([built], tmp_path / "i.vfi", base="data/train")
    (tmp_path / "copy").mkdir()
    shutil.copy(built / "shard-000000.tar", tmp_path / "copy")
    with pytest.raises(InputError, match=r"would both be s3://b/shard-000000\.tar"):
        index_shards([built, tmp_path / "copy"], tmp_path / "i.vfi", base="s3://b")
    (tmp_path / "copy" / "a b%20#?.tar").write_bytes((built / "shard-000001.tar").read_bytes())
    (tmp_path / "copy" / "shard-000000.tar").unlink()
    index = Index.open(index_shards([tmp_path / "copy"], tmp_path / "i.vfi", base="https://host/x"))
    assert index.shards[0].url == "https://host/x/a%20b%2520%23%3F.tar"


@pytest.mark.parametrize("kind", KINDS)
def test_verify_reads_each_remote_shard_once(server, built, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = index_shards([f"{getattr(server, kind)}/train/{NAMES}"], tmp_path / "i.vfi")
    server.requests.clear()
    found = verify(Index.open(path), workers=1)
    assert (found.samples, found.shards, found.without_digest) == (60, 5, 0)
    assert server.sent == found.bytes
    assert list(tmp_path.iterdir()) == [path]


def test_verify_names_the_faults_of_remote_shards(serve, built, tmp_path):
    shutil.copytree(built, tmp_path / "o")
    server = serve(tmp_path / "o")
    path = index_shards([f"{server.http}/{NAMES}"], tmp_path / "i.vfi")
    (tmp_path / "o" / "shard-000001.tar").unlink()
    data = bytearray((tmp_path / "o" / "shard-000003.tar").read_bytes())
    data[2000] ^= 1
    (tmp_path / "o" / "shard-000003.tar").write_bytes(data)
    with pytest.raises(InputError) as error:
        verify(Index.open(path), workers=2)
    message = str(error.value)
    assert "shard-000001.tar: 404 Not Found" in message
    assert f"{server.http}/shard-000003.tar: etag" in message


def test_checking_asks_for_sizes_and_etags_side_by_side(serve, built, tmp_path):
    shutil.copytree(built, tmp_path / "o")
    server = serve(tmp_path / "o")
    remote = index_shards([f"{server.s3}/"], tmp_path / "i.vfi")
    index = Index.open([remote, tmp_path / "o"])
    server.requests.clear()
    server.latency = 0.5
    begin = time.monotonic()
    index.check_files()
    assert time.monotonic() - begin < 5 * 0.5
    assert sorted(request.method for request in server.requests) == ["HEAD"] * 5
    server.latency = 0.0
    shard = tmp_path / "o" / "shard-000004.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + b"x")
    with pytest.raises(InputError, match=r"s3://.*/shard-000004\.tar: changed: etag .*, not"):
        index.check_files()
    shard.write_bytes(data[:-512])
    with pytest.raises(InputError, match=r"s3://.*/shard-000004\.tar: truncated: \d+ bytes, the index says"):
        index.check_files(local=0)
    shard.unlink()
    with pytest.raises(InputError, match=r"s3://.*/shard-000004\.tar: 404 Not Found; but the index lists it"):
        index.check_files(local=0)
    with pytest.raises(InputError, match=rf"{tmp_path}/o/shard-000004\.tar: No such file"):
        index.check_files(remote=0)
    server.requests.clear()
    index.check_files(local=0, remote=1)
    assert len(server.requests) == 1
    index.check_files(local=1, remote=0)
    assert len(server.requests) == 1


def test_the_commands_take_urls(server, built, tmp_path):
    done = run_here("shards.py", "index", f"{server.http}/train/{NAMES}", "--out", tmp_path / "i.vfi")
    assert done.status == 0, done.stderr
    assert Index.open(built).sequence in done.stdout
    assert "note: content of the shards: etag of 5 shards; not all of it is in the hash" in done.stderr
    done = run_here("shards.py", "verify", tmp_path / "i.vfi", "--workers", "1")
    assert (done.status, done.stdout.splitlines()[0][:22]) == (0, "in order: 60 samples, ")
    done = run_here("shards.py", "index", built, "--base", f"{server.http}/train", "--out", tmp_path / "u.vfi")
    assert done.status == 0, done.stderr
    done = run_here("shards.py", "index", f"{server.http}/train/", "--out", tmp_path / "i.vfi")
    assert (done.status, done.stderr.count("\n")) == (2, 1)
    assert "a folder cannot be listed over http" in done.stderr
