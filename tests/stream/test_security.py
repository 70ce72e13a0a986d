"""Hostile shards and URLs: refused, and nothing of them is run, unpickled, written or believed."""

import builtins
import bz2
import gzip
import io
import lzma
import os
import pickle
import subprocess
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
import webdataset

from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages
from pretrain.index.index import Index, SampleExtent
from pretrain.index.indexfile import key_hash
from pretrain.shards.scan import index_shards
from pretrain.shards.survey import locate, survey
from pretrain.shards.verify import verify
from pretrain.storage.location import expand
from pretrain.storage.shardfile import ShardReader, open_shard
from pretrain.storage.store import Extent
from pretrain.stream.chunk import Chunk
from pretrain.stream.counters import Counters
from pretrain.stream.loader import LoaderOptions, evaluation_batches


class Trap:
    """What unpickling it does can be seen."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def sprung(tmp_path, monkeypatch):
    """Whether anything has been run or unpickled so far."""
    seen = []

    def trap(name):
        return lambda *arguments, **options: seen.append(name) or pytest.fail(f"{name}{arguments}")

    for module, name in [
        (subprocess, "Popen"),
        (os, "system"),
        (os, "popen"),
        (pickle, "loads"),
        (pickle, "load"),
        (torch, "load"),
        (np, "load"),
        (builtins, "eval"),
    ]:
        monkeypatch.setattr(module, name, trap(name))
    return lambda: seen or (tmp_path / "sprung").exists()


class Elsewhere:
    """An index of one sample, of key `a`, in the first bytes of a shard."""

    def __init__(self, url, size):
        self.extent = SampleExtent(str(url), 0, size, count=1)

    def extents(self, ids):
        return [self.extent]

    def borders(self, extent):
        return [0, extent.end], [key_hash("a")]


def image_at(url, size):
    chunk = Chunk(np.arange(1))
    chunk.locate(Elsewhere(url, size), ShardReader())
    chunk.read(Counters())
    return chunk.take(0)


URLS = ["pipe:touch {}", "pipe://touch {}", "PIPE:touch {}", "gopen:pipe:touch {}", "exec:touch {}", "ftp://h/{}"]


@pytest.mark.parametrize("url", URLS)
def test_a_url_of_any_other_scheme_is_refused_at_every_door(tmp_path, sprung, url):
    url = url.format(tmp_path / "sprung")

    for door in (
        lambda: open_shard(url),
        lambda: ShardReader().read(Extent(url, 0, 512)),
        lambda: expand([url]),
        lambda: index_shards([url], tmp_path / "a.vfi"),
        lambda: Index.open(url),
        lambda: image_at(url, 512),
    ):
        with pytest.raises(InputError, match=r"is not read here"):
            door()
    assert not sprung()


def test_rewriting_of_urls_has_no_effect(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", f".*=pipe:touch {tmp_path / 'sprung'}; cat /dev/null #")
    index = shards.index
    chunk = Chunk(np.arange(1))
    chunk.locate(index, ShardReader())
    chunk.read(Counters())
    assert chunk.take(0) == (shards.keys[0], shards.images[0])
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def hostile(tmp_path, encoded):
    """Samples with an image, a label, and members that webdataset's own decoders would unpickle or run."""
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    members = ["pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten", "mp", "msg", "cbor", "py", "gz", "json.gz"]
    folder = tmp_path / "hostile"
    folder.mkdir()
    image = encoded(np.full((12, 12, 3), 7, np.uint8))
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(6):
            named = {"png": image, "cls": b"1", **{suffix: trap for suffix in members}}
            for suffix, data in named.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_members_that_others_unpickle_are_passed_over_unopened(hostile, sprung):
    index = Index.open(index_shards([hostile], workers=1))
    assert verify(index, workers=1).samples == 6
    assert [image.fault for image in survey(index).sampled] == [""] * 6
    assert locate(index, 3)["key"] == "3"
    (batch,) = evaluation_batches(index, EvalImages(8, 3), LoaderOptions(workers=1), batch=6)
    assert batch.valid.all()
    assert (batch.images == 7).all()
    assert not sprung()


def test_the_trap_would_be_sprung_by_webdatasets_own_decoder(hostile, tmp_path):
    """The test above can fail: what it puts into the shards does what it is feared to do."""
    sample = next(iter(webdataset.WebDataset(str(hostile / "a.tar"), shardshuffle=False)))
    pickle.loads(sample["pyd"])
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["../up.png", "/etc/cron.d/x.png", "a/../../b.png", "c:\\x.png", "new\nline.png", "a\0b.png"]
)
def test_names_that_lead_elsewhere_are_refused_and_nothing_is_written(tmp_path, name):
    before = {path for path in tmp_path.rglob("*")}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for suffix, data in (("", b"x"), (".cls", b"1")):
            info = tarfile.TarInfo("plain.cls" if suffix else "plain.png")
            info.size = len(data)
            if not suffix:
                info.pax_headers = {"path": name}
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(InputError, match=r"a\.tar: "):
        index_shards([tmp_path / "a.tar"], tmp_path / "a.vfi")
    assert {path for path in tmp_path.rglob("*")} - before == {tmp_path / "a.tar"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(InputError, match="samples are plain files"):
        index_shards([tmp_path / "a.tar"])


def header(name, size, kind):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse(size):
    """A GNU sparse file of `size` bytes, of which one block is there."""
    block = bytearray(header("a.png", 512, tarfile.GNUTYPE_SPARSE))
    block[386:398], block[398:410] = b"%011o\0" % 0, b"%011o\0" % 512  # where its one piece is
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


LARGE = header("a.png", 1 << 24, tarfile.REGTYPE) + bytes(1 << 24)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (gzip.compress(LARGE), "compressed with gzip"),
        (bz2.compress(LARGE), "compressed with bzip2"),
        (lzma.compress(LARGE), "compressed with xz"),
        (sparse(512), "is stored sparse"),
        (sparse(1 << 40), "is stored sparse"),
    ],
    ids=["gzip", "bzip2", "xz", "sparse", "sparse, a terabyte"],
)
def test_compressed_tars_and_sparse_files_are_refused_unexpanded(tmp_path, data, found):
    (tmp_path / "a.tar").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match=found):
        image_at(tmp_path / "a.tar", len(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_a_header_that_claims_a_terabyte_costs_nothing(tmp_path, shards, kind):
    data = header("a.png", 1 << 40, kind) + bytes(4096)
    (tmp_path / "a.tar").write_bytes(data)
    index = shards.index

    tracemalloc.start()
    with pytest.raises(InputError):
        index_shards([tmp_path / "a.tar"], workers=1)
    with pytest.raises(InputError):
        image_at(tmp_path / "a.tar", len(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    assert index.samples == 203
