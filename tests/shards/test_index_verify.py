"""The full check of an index, and what an index tells of its samples."""

import errno
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from pretrain.datasets.dataset import Dataset, png
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME
from pretrain.shards.keys import KeyHashes
from pretrain.shards.scan import index_shards
from pretrain.shards.survey import locate, survey, survey_text
from pretrain.shards.verify import verify
from pretrain.shards.write import ShardLayout, write_shards


def picture(row):
    height, width = 4 + row % 3, 5 + row % 4
    return png(np.full((height, width, 3) if row % 2 else (height, width), row, np.uint8))


@pytest.fixture
def folder(tmp_path):
    labels = np.array([0, 0, 0, 2, 2, 3] * 5, np.int32)
    data = Dataset("set", "all", labels, None, None, "f", lambda row: ("png", picture(row)))
    write_shards(data, tmp_path / "s", ShardLayout(samples=12))
    return tmp_path / "s"


def verify_fault(folder):
    with pytest.raises(InputError) as error:
        verify(Index.open(folder))
    return str(error.value)


def rewrite(path, change):
    """The members of a tar through `change(name, data) -> data`, in the same places where sizes allow."""
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            data = change(info.name, data)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def change_array(path, name, row, value):
    """One element of one array of an index file."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[8:16], "little")
    dtype, _, at = json.loads(data[16 : 16 + length])["arrays"][name]
    begin = -(-(16 + length) // 64) * 64 + at + row * np.dtype(dtype).itemsize
    data[begin : begin + np.dtype(dtype).itemsize] = np.array(value, dtype).tobytes()
    path.write_bytes(data)


def test_whole_shards_are_in_order(folder):
    found = verify(Index.open(folder))
    assert (found.samples, found.shards, found.without_digest) == (30, 3, 0)
    assert found.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    index_shards([folder], content=False)
    assert verify(Index.open([folder, folder]), workers=1).without_digest == 6


def test_one_changed_byte_of_a_shard_is_found(folder):
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    assert f"{path}: sha256 " in verify_fault(folder)


def test_a_picture_that_does_not_decode_is_found_by_key_and_byte(folder):
    path = folder / "shard-000002.tar"
    with tarfile.open(path) as tar:
        name = [info.name for info in tar if info.name.endswith(".png")][1]
    rewrite(path, lambda found, data: data[:45] if found == name else data)
    index_shards([folder])
    message = verify_fault(folder)
    assert message.startswith("1 fault found\n")
    assert f"{path}: sample '{name[:-4]}' at byte" in message
    assert ".png cannot be decoded: " in message


def test_shards_are_read_as_training_reads_them(folder, monkeypatch):
    monkeypatch.setattr("pretrain.stream.chunk.plain_members", lambda data: [])
    message = verify_fault(folder)
    assert message.startswith("30 faults found\n")
    assert message.count(".png cannot be read: ") == 20
    assert "no image; the index expects that of sample" in message


def test_labels_and_keys_that_changed_under_the_index_are_found(folder):
    first = Index.open(folder).shards[0].url
    rewrite(first, lambda name, data: b"7" if name.endswith(".cls") else data)
    message = verify_fault(folder)
    assert "labels [7], the index says [" in message
    change_array(folder / INDEX_NAME, "key_hashes", 14, 0)
    message = verify_fault(folder)
    assert "another key there (crc32 differs)" in message
    assert "its arrays hash to" in message


@pytest.mark.parametrize(
    ("array", "row", "value", "found"),
    [
        ("digests", 0, ord("r"), "the index says 'rha256:"),
        ("offsets", 3, 999_999, "the index says byte 511999488"),
        ("labels", 3, 9, "the index says [9]"),
        ("data_end", 1, 512, "the index says 512"),
        ("shard_bytes", 2, 512, "bytes, the index says 512"),
        ("first", 1, 11, "12 samples, the index says 11"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_found(folder, array, row, value, found):
    change_array(folder / INDEX_NAME, array, row, value)
    assert found in verify_fault(folder)


def test_a_disk_that_does_not_give_its_bytes_is_told(folder, monkeypatch):
    class Broken(io.FileIO):
        def readinto(self, buffer):
            if self.tell() > 3000 and str(self.name).endswith("shard-000001.tar"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(buffer)

    def opened(url, *, stop=None):
        return io.BufferedReader(Broken(url))

    monkeypatch.setattr("pretrain.shards.scan.open_whole", opened)
    monkeypatch.setattr("pretrain.shards.verify.open_whole", opened)
    path = folder / "shard-000001.tar"
    with pytest.raises(InputError, match=f"^{path}: cannot be reached for now: Input/output error$"):
        index_shards([folder], workers=1)
    with pytest.raises(InputError) as error:
        verify(Index.open(folder), workers=1)
    assert str(error.value) == f"1 fault found\n{path}: cannot be read: Input/output error"


def test_all_faults_are_listed_not_the_first_only(folder):
    (folder / "shard-000000.tar").unlink()
    cut = folder / "shard-000002.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    message = verify_fault(folder)
    assert "shard-000000.tar: No such file" in message
    assert "shard-000002.tar: 3000 bytes, the index says" in message
    assert "shard-000002.tar: truncated: 3000 bytes, cut in" in message


def test_a_key_shared_by_two_shards_is_found_though_the_index_agrees(folder, tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    for name in ("a.tar", "b.tar"):
        shutil.copy(folder / "shard-000000.tar", tmp_path / "t" / name)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(KeyHashes, "refuse_shared", lambda *arguments: None)
        index_shards([tmp_path / "t"])
    assert f"{tmp_path}/t/b.tar: key " in verify_fault(tmp_path / "t")


def test_locate_tells_shard_key_byte_and_label(folder):
    index = Index.open([folder, folder])
    for number in (0, 11, 12, 29, 30, 59):
        found = locate(index, number)
        assert found["id"] == number
        with open(found["shard"], "rb") as file:
            file.seek(found["offset"])
            info = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict")
        assert info.name == f"{found['key']}.cls"
        assert found["label"] == [0, 0, 0, 2, 2, 3][int(found["key"]) % 6]
        assert found["bytes"] == 2048
    with pytest.raises(InputError, match=r"id 60 is out of range; this index has ids 0 … 59"):
        locate(index, 60)


def test_locate_refuses_a_shard_that_changed_under_the_index(folder):
    shards = [folder / f"shard-00000{number}.tar" for number in (0, 1)]
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(InputError, match="the index another key"):
        locate(Index.open(folder), 0)


def test_label_lists_are_located_as_lists(tmp_path):
    data = Dataset(
        "set",
        "all",
        np.array([4, 1], np.int32),
        np.array([0, 2, 2]),
        None,
        "f",
        lambda row: ("png", picture(row)),
    )
    write_shards(data, tmp_path / "s")
    found = [locate(Index.open(tmp_path / "s"), number) for number in (0, 1)]
    assert {row["key"]: row["label"] for row in found} == {"00000000": [4, 1], "00000001": []}
    figures = survey(Index.open(tmp_path / "s")).figures()
    assert figures["labels"] == {"lists": True, "per_sample_max": 2, "per_sample_mean": 1.0}


def test_stats_sum_up_samples_classes_and_image_sizes(folder):
    figures = survey(Index.open(folder)).figures()
    assert figures["samples"] == 30
    assert figures["shards"]["samples"] == {"min": 6, "median": 12.0, "max": 12}
    classes = figures["classes"]
    assert (classes["count"], classes["empty"]) == (4, 1)
    assert [(row["label"], row["samples"]) for row in classes["most"]] == [(0, 15), (2, 10), (3, 5), (1, 0)]
    assert classes["fewest"][0]["label"] == 1
    images = figures["images"]
    assert images["read"] == 30
    assert images["width"] == {"min": 5, "median": 6.0, "max": 8}
    assert images["height"] == {"min": 4, "median": 5.0, "max": 6}
    assert images["formats"] == {"PNG L": 15, "PNG RGB": 15}
    assert survey(Index.open(folder), images=7).figures()["images"]["read"] == 7
    text = survey_text(figures)
    assert "samples   30" in text
    assert "classes   4, 1 of them empty" in text
    assert figures["hash"] in text
    assert figures["content"] == {"sha256": 3, "etag": 0, "unknown": 0, "in_hash": True}
    assert "content   sha256 of 3 shards\n" in text
    index_shards([folder], content=False)
    text = survey_text(survey(Index.open(folder), images=1).figures())
    assert "content   unknown of 3 shards; not all of it is in the hash: other images" in text
