"""Scanning shards that users bring: what is found, and how each fault is named."""

import io
import json
import os
import re
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from webdataset.tariterators import tarfile_samples

from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME, key_hash
from pretrain.shards import scan
from pretrain.shards.indexwriter import write_index
from pretrain.shards.scan import index_shards, scan_shard
from pretrain.storage.location import expand

IMAGE = b"not decoded by the scanner" * 60


def fault(path, *arguments):
    with pytest.raises(InputError) as error:
        scan_shard(str(path), *arguments)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def extent_samples(extent, tmp_path):
    """What webdataset's own expansion makes of an extent's bytes alone."""
    with open(extent.url, "rb") as file:
        file.seek(extent.begin)
        data = file.read(extent.end - extent.begin)
    (tmp_path / "piece.tar").write_bytes(data + bytes(1024))
    found = list(tarfile_samples([{"url": str(tmp_path / "piece.tar")}]))
    (tmp_path / "piece.tar").unlink()
    return found


def test_a_folder_of_shards_is_indexed_in_name_order(tmp_path, make_tar, plain):
    make_tar(tmp_path / "b.tar", plain(3, 4))
    make_tar(tmp_path / "a.tar", plain(0, 3))
    path = index_shards([tmp_path])
    assert path == tmp_path / INDEX_NAME
    index = Index.open(tmp_path)
    assert [(os.path.basename(s.url), s.samples) for s in index.shards] == [("a.tar", 3), ("b.tar", 4)]
    assert index.labels(np.arange(7))[:, 0].tolist() == [n % 5 for n in range(7)]
    assert index.key_hash([4]).tolist() == [key_hash("0004")]
    assert [s.bytes for s in index.shards] == [os.path.getsize(s.url) for s in index.shards]
    index.check_files()


def test_every_extent_holds_its_samples_as_webdataset_reads_them(tmp_path, make_tar):
    """Long names, folders, metadata and mixed formats included: header bytes belong to their sample."""
    long_name = "folder/" + "x" * 150
    members = [
        ("./", b"", {"type": tarfile.DIRTYPE}),
        (f"{long_name}1.cls", b"1"),
        (f"{long_name}1.jpg", IMAGE),
        ("été/2.CLS", b"2\n"),
        ("été/2.Jpeg", IMAGE),
        ("__info__", b"of the writer"),
        ("3.json", b"{}"),
        ("3.png", IMAGE),
        ("3.cls", b" 3 "),
        ("4.seg.png", b"mask"),
        ("4.webp", IMAGE),
        ("4.cls", b"4"),
    ]
    keys = [f"{long_name}1", "été/2", "3", "4"]
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        folder = tmp_path / str(number)
        folder.mkdir()
        make_tar(folder / "a.tar", members, format=form)
        index = Index.open(index_shards([folder]).parent)
        assert index.samples == 4
        assert index.labels(np.arange(4))[:, 0].tolist() == [1, 2, 3, 4]
        for row, key in enumerate(keys):
            [extent] = index.extents([row])
            [sample] = extent_samples(extent, tmp_path)
            assert sample["__key__"] == key
            assert int(sample["cls"]) == row + 1
            assert index.key_hash([row])[0] == key_hash(key)
        [whole] = index.extents(np.arange(4))
        assert [sample["__key__"] for sample in extent_samples(whole, tmp_path)] == keys
        assert whole.end == index.shards[0].data_end


def test_label_lists_come_from_json(tmp_path, make_tar, plain):
    members = []
    for key, text in (("a", "[3, 0]"), ("b", "[]"), ("c", "[7]")):
        members += [(f"{key}.jpg", IMAGE), (f"{key}.json", text.encode())]
    make_tar(tmp_path / "a.tar", members)
    make_tar(tmp_path / "b.tar", plain(0, 1, lambda n: 9))
    index = Index.open(index_shards([tmp_path]).parent)
    assert (index.multilabel, index.num_classes) == (True, 10)
    assert index.labels(np.arange(4)).tolist() == [[3, 0], [-1, -1], [7, -1], [9, -1]]


def test_a_key_in_two_shards_is_refused_with_both(tmp_path, make_tar, plain):
    make_tar(tmp_path / "a.tar", plain(0, 3))
    make_tar(tmp_path / "b.tar", plain(2, 3))
    with pytest.raises(InputError) as error:
        index_shards([tmp_path])
    assert f"{tmp_path}/b.tar: key '0002' at byte 0 also occurs in {tmp_path}/a.tar" in str(error.value)
    assert not (tmp_path / INDEX_NAME).exists()


def test_keys_that_only_hash_alike_are_no_duplicates(tmp_path, monkeypatch, make_tar, plain):
    make_tar(tmp_path / "a.tar", plain(0, 3))
    make_tar(tmp_path / "b.tar", plain(3, 3))
    monkeypatch.setattr(scan, "wide_hash", lambda key: 7)
    assert Index.open(index_shards([tmp_path])).samples == 6


@pytest.mark.parametrize(
    ("suffix", "text", "found"),
    [
        ("cls", b"cat", "found 'cat'; a label is one integer"),
        ("cls", b"3.0", "found '3.0'"),
        ("cls", b"", "found ''"),
        ("cls", b"1_0", "found '1_0'"),
        ("cls", "٣".encode(), "a label is one integer"),
        ("cls", b"-1", "label -1 is out of range; labels are 0 … 99"),
        ("cls", b"100", "label 100 is out of range; labels are 0 … 99"),
        ("cls", b"1" * 65, "65 bytes are no label"),
        ("json", b"{}", "a label is a JSON list of integers"),
        ("json", b"[1, 2", "found '[1, 2'"),
        ("json", b"[0, true]", "found '[0, true]'"),
        ("json", b"[1.0]", "found '[1.0]'"),
        ("json", b"[3, 3]", "a class is listed once"),
        ("json", b"[3, 100]", "label 100 is out of range"),
        ("json", b"\xff\xfe", "a label is a JSON list"),
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path, suffix, text, found, make_tar, plain):
    path = make_tar(tmp_path / "a.tar", [*plain(0, 1), ("b.jpg", IMAGE), (f"b.{suffix}", text)])
    message = fault(path, 100)
    assert found in message
    assert f"sample 'b', .{suffix} at byte" in message


def test_labels_fit_int32_where_no_number_of_classes_is_given(tmp_path, make_tar):
    for text, fits in ((b"2147483647", True), (b"2147483648", False)):
        path = make_tar(tmp_path / "a.tar", [("a.cls", text), ("a.jpg", IMAGE)])
        if fits:
            assert scan_shard(str(path)).entry.labels.tolist() == [2147483647]
        else:
            assert "out of range" in fault(path)


def test_brace_patterns_files_and_folders_name_shards(tmp_path, make_tar, plain):
    for number in range(12):
        make_tar(tmp_path / f"s-{number:03d}.tar", plain(number, 1))
    names = [str(tmp_path / f"s-{number:03d}.tar") for number in range(12)]
    assert expand([f"{tmp_path}/s-{{000..011}}.tar"]) == names
    assert expand([f"{tmp_path}/s-{{002,001}}.tar", tmp_path / "s-000.tar"]) == [names[2], names[1], names[0]]
    assert expand([tmp_path]) == expand([f"{tmp_path}/*.tar"]) == names
    assert expand([f"{tmp_path}/s-00?.tar"]) == names[:10]
    assert expand([f"{tmp_path}/s-{{01,00}}[01].tar"]) == [names[10], names[11], names[0], names[1]]
    (tmp_path / "s-[0].tar").write_bytes(b"")  # named as it is
    assert expand([f"{tmp_path}/s-[0].tar"]) == [f"{tmp_path}/s-[0].tar"]
    for patterns, found in (
        ([f"{tmp_path}/s-{{000..012}}.tar"], r"s-012\.tar: no such shard"),
        ([tmp_path, names[3]], r"s-003\.tar: named twice"),
        ([f"{tmp_path}/s-{{000..0"], "broken brace pattern"),
        ([tmp_path / "empty"], r"no \*\.tar in this folder"),
        ([], "no shards given"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=found):
            expand(patterns)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.tar.gz", r"\(a\.tar\.gz is compressed: shards are plain tars\)"),
        ("1.JPG", r"\(of images, as 1\.JPG, shards are made by: python launch/shards\.py build {folder} DIR\)"),
        ("cat/1.jpg", r"\(of images, as cat/1\.jpg, shards are made by: python launch/shards\.py build {folder} DIR\)"),
        ("train/cat/1.jpg", r"\(of images, as train/cat/1\.jpg, shards are made by: .* build {folder} DIR\)"),
        ("train/a.tar", r"\({folder}/train holds some\)"),
        ("train.vfi", r"\(the index {folder}/train\.vfi\?\)"),
        ("README", r"(index {folder}|the shards)"),
    ],
)
def test_a_folder_without_shards_is_told_with_what_it_holds_instead(tmp_path, name, found):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    for take in (index_shards, Index.open):
        with pytest.raises(InputError, match=f"{tmp_path}: no .* in this folder.*{found.format(folder=tmp_path)}$"):
            take([tmp_path])


def test_shards_in_the_place_of_an_index_are_told_with_the_command(tmp_path):
    for given in ("*.tar", "{0..3}.tar", "a.tar"):
        with pytest.raises(InputError, match=f"no such index; .*index '{re.escape(str(tmp_path / given))}' --out FILE"):
            Index.open(tmp_path / given)


@pytest.mark.parametrize("url", ["pipe:cat a.tar", "hf://datasets/a.tar", "az://c/{0..9}.tar", "file:///a.tar"])
def test_other_schemes_are_refused_with_those_that_are_read(url):
    with pytest.raises(InputError, match="is not read here; shards are local paths or URLs of http, https, s3 and gs"):
        index_shards([url])
    with pytest.raises(InputError, match="is not read here") as error:
        index_shards(["ftp://me:secret@host/a.tar"])
    assert "secret" not in str(error.value)


def test_the_index_of_shards_in_several_folders_needs_a_place(tmp_path, make_tar, plain):
    for name in "ab":
        (tmp_path / name).mkdir()
        make_tar(tmp_path / name / "0.tar", plain(10 * ord(name), 2))
    shards = [tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"]
    with pytest.raises(InputError, match=r"2 folders .*--out FILE"):
        index_shards(shards)
    with pytest.raises(InputError, match="a shard's name"):
        index_shards(shards, tmp_path / "index.tar")
    with pytest.raises(InputError, match="no folder"):
        index_shards(shards, tmp_path / "nowhere" / "index.vfi")
    index_shards(shards, tmp_path / "a" / "both.vfi")
    shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    index = Index.open(tmp_path.with_name("moved") / "a" / "both.vfi")
    assert [shard.url for shard in index.shards] == [str(tmp_path.with_name("moved") / n / "0.tar") for n in "ab"]
    index.check_files()


def test_processes_find_what_one_finds(tmp_path, make_tar, plain):
    for number in range(6):
        make_tar(tmp_path / f"{number}.tar", plain(number * 10, 5))
    one = index_shards([tmp_path], tmp_path / "one.vfi", workers=1, content=True)
    two = index_shards([tmp_path], tmp_path / "two.vfi", workers=2, content=True)
    assert one.read_bytes() == two.read_bytes()
    assert Index.open(one).shards[0].digest.startswith("sha256:")
    make_tar(tmp_path / "4.tar", plain(40, 5)[:-1])
    with pytest.raises(InputError, match=r"4\.tar: sample '0044' .* has no image"):
        index_shards([tmp_path], workers=2)


def test_the_scan_reads_headers_and_labels_only(tmp_path, monkeypatch, make_tar):
    big = bytes(5 << 20)
    path = make_tar(tmp_path / "a.tar", [(f"{n}.{s}", d) for n in range(3) for s, d in (("cls", b"1"), ("jpg", big))])
    opened = []

    class Counting(io.FileIO):
        count = 0

        def readinto(self, buffer):
            size = super().readinto(buffer)
            self.count += size
            return size

        def readall(self):
            raise AssertionError("reads everything")

    def opener(url, stop):
        opened.append(Counting(url))
        return io.BufferedReader(opened[0], 4096)

    monkeypatch.setattr(scan, "open_shard", opener)
    assert scan_shard(str(path)).entry.samples == 3
    assert opened[0].count < 200_000


def test_json_labels_written_by_others_with_whitespace_are_read(tmp_path, make_tar):
    text = json.dumps([5, 6], indent=2).encode() + b"\n"
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE), ("a.json", text)])
    assert scan_shard(str(path)).entry.labels.tolist() == [5, 6]


def test_class_names_stay_where_the_samples_stay(tmp_path, make_tar, plain):
    for number in range(2):
        make_tar(tmp_path / f"{number}.tar", plain(number * 10, 5))
    names = tuple("abcde")
    entries = [scan_shard(str(tmp_path / f"{number}.tar")).entry for number in range(2)]
    write_index(tmp_path / INDEX_NAME, [replace(entry, url=os.path.basename(entry.url)) for entry in entries], names)
    for out in (None, tmp_path / "elsewhere.vfi", None):
        assert Index.open(index_shards([tmp_path], out)).classes == names
    make_tar(tmp_path / "1.tar", plain(10, 5, lambda number: 4 - number % 5))
    assert Index.open(index_shards([tmp_path])).classes is None


def test_a_scan_that_fails_leaves_the_index_that_was_there(tmp_path, make_tar, plain):
    make_tar(tmp_path / "a.tar", plain(0, 3))
    before = index_shards([tmp_path]).read_bytes()
    make_tar(tmp_path / "b.tar", plain(2, 3))
    with pytest.raises(InputError, match="also occurs in"):
        index_shards([tmp_path])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", INDEX_NAME]
    assert (tmp_path / INDEX_NAME).read_bytes() == before
