"""Scanning shards that users bring: what is found, and how each fault is named."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from webdataset.tariterators import base_plus_ext, tarfile_samples

from pretrain.errors import InputError
from pretrain.stream import scan
from pretrain.stream.index import Index
from pretrain.stream.indexfile import INDEX_NAME, key_hash
from pretrain.stream.location import expand
from pretrain.stream.scan import index_shards, scan_shard
from pretrain.stream.tar import split_name

IMAGE = b"not decoded by the scanner" * 60  # three blocks and a bit


def add(tar, name, data=IMAGE, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(path, members, **options):
    """A tar of `members`: (name, data) or (name, data, fields of its header)."""
    with tarfile.open(path, "w", **{"format": tarfile.USTAR_FORMAT, **options}) as tar:
        for name, data, *fields in members:
            add(tar, name, data, **(fields[0] if fields else {}))
    return path


def plain(first, count, label=lambda number: number % 5):
    """Members of `count` good samples."""
    numbers = range(first, first + count)
    return [pair for n in numbers for pair in ((f"{n:04d}.cls", b"%d" % label(n)), (f"{n:04d}.jpg", IMAGE + b"%d" % n))]


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


def test_a_folder_of_shards_is_indexed_in_name_order(tmp_path):
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


def test_every_extent_holds_its_samples_as_webdataset_reads_them(tmp_path):
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


def test_names_are_split_as_webdataset_splits_them():
    names = [
        "a.jpg",
        "a/b.c/d.e.JPG",
        "./a.cls",
        "0.5.jpg",
        "a.b/c",
        "README",
        ".hidden",
        "a b.tar.gz",
        "x/y.z",
    ]
    for name in names:
        key, suffix = base_plus_ext(name)
        assert split_name(name) == (None if key is None else (key, suffix.lower()))


def test_label_lists_come_from_json(tmp_path):
    members = []
    for key, text in (("a", "[3, 0]"), ("b", "[]"), ("c", "[7]")):
        members += [(f"{key}.jpg", IMAGE), (f"{key}.json", text.encode())]
    make_tar(tmp_path / "a.tar", members)
    make_tar(tmp_path / "b.tar", plain(0, 1, lambda n: 9))
    index = Index.open(index_shards([tmp_path]).parent)
    assert (index.multilabel, index.num_classes) == (True, 10)
    assert index.labels(np.arange(4)).tolist() == [[3, 0], [-1, -1], [7, -1], [9, -1]]


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    """At a header, inside one, in data, in padding, between members: never fewer samples without an error."""
    long_names = [("x" * 150 + name, data) for name, data in plain(0, 3)]
    for members, form in ((plain(0, 3), "PAX"), (long_names, "PAX"), (long_names, "GNU")):
        whole = make_tar(tmp_path / "whole.tar", members, format=getattr(tarfile, f"{form}_FORMAT"))
        data = whole.read_bytes()
        data_end = scan_shard(str(whole)).entry.data_end
        cut = tmp_path / "cut.tar"
        for length in {*range(0, data_end + 1, 256), 1, 511, 513, data_end - 1, data_end + 1, data_end + 511}:
            cut.write_bytes(data[:length])
            found = fault(cut)
            assert members is long_names or "truncated" in found, (length, found)
    # A whole end marker is enough: nothing of a sample is in the padding behind it.
    cut.write_bytes(data[: data_end + 512])
    assert scan_shard(str(cut)).entry.samples == 3


def test_the_place_of_a_cut_is_told(tmp_path):
    data = make_tar(tmp_path / "whole.tar", plain(0, 3)).read_bytes()
    second = scan_shard(str(tmp_path / "whole.tar")).entry.offsets[1] * 512
    cut = tmp_path / "cut.tar"
    for length, found in (
        (second + 100, f"truncated: {second + 100} bytes, cut in the header at byte {second}"),
        (second + 1024 + 600, f"truncated: {second + 1624} bytes, cut in the data of member '0001.jpg'"),
        (
            second + 1024,
            f"truncated: {second + 1024} bytes and no end-of-archive marker; cut between two members",
        ),
    ):
        cut.write_bytes(data[:length])
        assert found in fault(cut)


def test_a_damaged_header_is_refused_where_it_is(tmp_path):
    path = make_tar(tmp_path / "a.tar", plain(0, 3))
    third = int(scan_shard(str(path)).entry.offsets[2]) * 512
    data = bytearray(path.read_bytes())
    data[third + 5] ^= 1
    path.write_bytes(data)
    assert f"no tar header at byte {third}" in fault(path)
    data[third : third + 512] = bytes(512)
    path.write_bytes(data)
    assert f"data after the end-of-archive marker at byte {third}" in fault(path)


def test_whatever_bits_flip_the_scan_ends_in_a_result_or_an_input_error(tmp_path):
    names = [("x" * 120 + f"{n}.{suffix}", b"1") for n in range(3) for suffix in ("cls", "jpg")]
    whole = [
        make_tar(tmp_path / f"{form}.tar", names, format=form).read_bytes()
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    ]
    random = np.random.default_rng(0)
    refused = 0
    for trial in range(600):
        data = bytearray(whole[trial % 2])
        at = int(random.integers(0, len(names) * 2048))
        data[at : at + int(random.integers(1, 20))] = random.bytes(int(random.integers(1, 20)))
        # Where the checksum is kept right, damage goes deeper than the header.
        header = at - at % 512
        block = data[header : header + 512]
        total = sum(block[:148]) + sum(block[156:]) + 8 * 32
        data[header + 148 : header + 156] = b"%06o\0 " % total
        (tmp_path / "flipped.tar").write_bytes(data)
        try:
            scan_shard(str(tmp_path / "flipped.tar"))
        except InputError:
            refused += 1
    assert refused > 300


def test_no_damaged_size_makes_the_scanner_read_beyond_a_header(tmp_path):
    info = tarfile.TarInfo("@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(20480))
    assert "extended header of 1099511627776 bytes" in fault(tmp_path / "a.tar")


def test_a_header_that_breaks_tarfile_itself_is_an_input_error(tmp_path):
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    members = [*plain(0, 1), ("a.jpg", IMAGE, {"pax_headers": sparse})]
    make_tar(tmp_path / "a.tar", members, format=tarfile.PAX_FORMAT)
    assert "damaged at byte" in fault(tmp_path / "a.tar")
    # A size beyond any file, in a member that belongs to no sample.
    info = tarfile.TarInfo("__meta__")
    info.type, info.size = b"Z", 1 << 80
    first = make_tar(tmp_path / "b.tar", plain(0, 1)).read_bytes()[:3584]
    (tmp_path / "b.tar").write_bytes(first + info.tobuf(tarfile.GNU_FORMAT) + bytes(20480))
    assert "damaged at byte" in fault(tmp_path / "b.tar")


def test_a_key_that_comes_again_in_its_shard_is_refused(tmp_path):
    twice = make_tar(tmp_path / "twice.tar", [*plain(0, 2), *plain(0, 1)])
    assert "key '0000' again at byte" in fault(twice)
    apart = make_tar(tmp_path / "apart.tar", [("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", IMAGE), ("b.jpg", IMAGE)])
    assert "sample 'a' at byte 0 has no image" in fault(apart)
    apart = make_tar(tmp_path / "apart.tar", [*plain(0, 2), ("0000.txt", b"caption")])
    assert "the members of a sample stand together" in fault(apart)
    adjacent = make_tar(tmp_path / "adjacent.tar", [*plain(0, 1), *plain(0, 1)])
    assert "member '0000.cls' twice" in fault(adjacent)


def test_a_key_in_two_shards_is_refused_with_both(tmp_path):
    make_tar(tmp_path / "a.tar", plain(0, 3))
    make_tar(tmp_path / "b.tar", plain(2, 3))
    with pytest.raises(InputError) as error:
        index_shards([tmp_path])
    assert f"{tmp_path}/b.tar: key '0002' at byte 0 also occurs in {tmp_path}/a.tar" in str(error.value)
    assert not (tmp_path / INDEX_NAME).exists()


def test_keys_that_only_hash_alike_are_no_duplicates(tmp_path, monkeypatch):
    make_tar(tmp_path / "a.tar", plain(0, 3))
    make_tar(tmp_path / "b.tar", plain(3, 3))
    monkeypatch.setattr(scan, "wide_hash", lambda key: 7)
    assert Index.open(index_shards([tmp_path])).samples == 6


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([("a.jpg", IMAGE)], "sample 'a' at byte 0 has no label: members jpg"),
        ([("a.cls", b"1")], "sample 'a' at byte 0 has no image: members cls"),
        ([("a.v2.jpg", IMAGE), ("a.cls", b"1")], "WebDataset cuts a name at its first dot"),
        ([("a.cls", b"1"), ("a.jpg", IMAGE), ("a.png", IMAGE)], "more than one image"),
        ([], "holds no samples"),
    ],
)
def test_a_sample_that_lacks_a_member_is_refused(tmp_path, members, found):
    assert found in fault(make_tar(tmp_path / "a.tar", members))


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
def test_a_label_that_is_none_is_refused(tmp_path, suffix, text, found):
    path = make_tar(tmp_path / "a.tar", [*plain(0, 1), ("b.jpg", IMAGE), (f"b.{suffix}", text)])
    message = fault(path, 100)
    assert found in message
    assert f"sample 'b', .{suffix} at byte" in message


def test_labels_fit_int32_where_no_number_of_classes_is_given(tmp_path):
    for text, fits in ((b"2147483647", True), (b"2147483648", False)):
        path = make_tar(tmp_path / "a.tar", [("a.cls", text), ("a.jpg", IMAGE)])
        if fits:
            assert scan_shard(str(path)).entry.labels.tolist() == [2147483647]
        else:
            assert "out of range" in fault(path)


@pytest.mark.parametrize(
    ("name", "fields", "found"),
    [
        ("/etc/a.jpg", {}, "absolute names"),
        ("../a.jpg", {}, "'..'"),
        ("a/../../b.jpg", {}, "'..'"),
        ("a\\b.jpg", {}, "backslashes"),
        ("a\nb.jpg", {}, "control characters"),
        ("a\udcff.jpg", {}, "not UTF-8"),
        ("README", {}, "belongs to no sample"),
        ("./._a.jpg", {}, "belongs to no sample"),
        ("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link, device or sparse"),
        ("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "b.jpg"}, "link, device or sparse"),
        ("a.jpg", {"type": tarfile.CHRTYPE}, "link, device or sparse"),
        ("a.jpg", {"type": tarfile.FIFOTYPE}, "link, device or sparse"),
        ("a.jpg", {"type": b"Z"}, "link, device or sparse"),
    ],
)
def test_a_member_that_is_no_plain_file_of_a_sample_is_refused(tmp_path, name, fields, found):
    path = make_tar(tmp_path / "a.tar", [*plain(0, 1), (name, b"", fields)])
    assert found in fault(path)


def test_a_global_header_that_later_bytes_depend_on_is_refused(tmp_path):
    make_tar(tmp_path / "a.tar", plain(0, 1), format=tarfile.PAX_FORMAT, pax_headers={"path": "b.jpg"})
    assert "global PAX header sets path" in fault(tmp_path / "a.tar")
    make_tar(tmp_path / "b.tar", plain(0, 1), format=tarfile.PAX_FORMAT, pax_headers={"comment": "git"})
    assert scan_shard(str(tmp_path / "b.tar")).entry.offsets.tolist() == [2]


def test_what_is_no_plain_tar_is_told_for_what_it_is(tmp_path):
    make_tar(tmp_path / "a.tar", plain(0, 1))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        add(tar, "a.jpg")
    assert "compressed with gzip" in fault(tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(b"x" * 5000)
    assert "not a tar archive" in fault(tmp_path / "c.tar")
    joined = (tmp_path / "a.tar").read_bytes() * 2
    (tmp_path / "d.tar").write_bytes(joined)
    assert "which readers never see" in fault(tmp_path / "d.tar")


def test_brace_patterns_files_and_folders_name_shards(tmp_path):
    for number in range(12):
        make_tar(tmp_path / f"s-{number:03d}.tar", plain(number, 1))
    names = [str(tmp_path / f"s-{number:03d}.tar") for number in range(12)]
    assert expand([f"{tmp_path}/s-{{000..011}}.tar"]) == names
    assert expand([f"{tmp_path}/s-{{002,001}}.tar", tmp_path / "s-000.tar"]) == [names[2], names[1], names[0]]
    assert expand([tmp_path]) == names
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


@pytest.mark.parametrize("url", ["pipe:cat a.tar", "http://host/a.tar", "s3://bucket/{0..9}.tar", "file:///a.tar"])
def test_only_local_paths_are_opened(url):
    with pytest.raises(InputError, match="is not read here"):
        index_shards([url])


def test_the_index_of_shards_in_several_folders_needs_a_place(tmp_path):
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


def test_processes_find_what_one_finds(tmp_path):
    for number in range(6):
        make_tar(tmp_path / f"{number}.tar", plain(number * 10, 5))
    one = index_shards([tmp_path], tmp_path / "one.vfi", workers=1, digests=True)
    two = index_shards([tmp_path], tmp_path / "two.vfi", workers=2, digests=True)
    assert one.read_bytes() == two.read_bytes()
    assert Index.open(one).shards[0].digest.startswith("sha256:")
    make_tar(tmp_path / "4.tar", plain(40, 5)[:-1])
    with pytest.raises(InputError, match=r"4\.tar: sample '0044' .* has no image"):
        index_shards([tmp_path], workers=2)


def test_the_scan_reads_headers_and_labels_only(tmp_path, monkeypatch):
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

    def opener(url):
        opened.append(Counting(url))
        return io.BufferedReader(opened[0], 4096)

    monkeypatch.setattr(scan, "open_shard", opener)
    assert scan_shard(str(path)).entry.samples == 3
    assert opened[0].count < 200_000


def test_json_labels_written_by_others_with_whitespace_are_read(tmp_path):
    text = json.dumps([5, 6], indent=2).encode() + b"\n"
    path = make_tar(tmp_path / "a.tar", [("a.jpg", IMAGE), ("a.json", text)])
    assert scan_shard(str(path)).entry.labels.tolist() == [5, 6]
