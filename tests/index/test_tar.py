"""Tars as they come: cut, damaged, or not what a sample is made of; each fault is named where it is."""

import json
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
from webdataset.tariterators import base_plus_ext, tarfile_samples

from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.index.tar import key_and_suffix
from pretrain.shards.scan import index_shards, scan_shard
from pretrain.shards.survey import locate, read_image, survey, survey_text
from pretrain.shards.verify import verify
from pretrain.storage.shardfile import ShardReader
from pretrain.stream.chunk import Chunk
from pretrain.stream.counters import Counters

IMAGE = b"not decoded by the scanner" * 60


def fault(path, *arguments):
    with pytest.raises(InputError) as error:
        scan_shard(str(path), *arguments)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_a_tar_cut_anywhere_is_refused(tmp_path, make_tar, plain):
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
    # Room that was taken for a copy which was cut off: zeros, as at the end of a tar.
    cut.write_bytes(data[:data_end] + bytes(5 << 20))
    assert f"nothing but zeros from byte {data_end} to {data_end + (5 << 20)}" in fault(cut)
    # A whole end marker is enough: nothing of a sample is in the padding behind it.
    cut.write_bytes(data[: data_end + 512])
    assert scan_shard(str(cut)).entry.samples == 3


def test_the_place_of_a_cut_is_told(tmp_path, make_tar, plain):
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


def test_a_damaged_header_is_refused_where_it_is(tmp_path, make_tar, plain):
    path = make_tar(tmp_path / "a.tar", plain(0, 3))
    third = int(scan_shard(str(path)).entry.offsets[2]) * 512
    data = bytearray(path.read_bytes())
    data[third + 5] ^= 1
    path.write_bytes(data)
    assert f"no tar header at byte {third}" in fault(path)
    data[third : third + 512] = bytes(512)
    path.write_bytes(data)
    assert f"data after the end-of-archive marker at byte {third}" in fault(path)


def test_whatever_bits_flip_the_scan_ends_in_a_result_or_an_input_error(tmp_path, make_tar):
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


def test_a_header_that_breaks_tarfile_itself_is_an_input_error(tmp_path, make_tar, plain):
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


def test_a_key_that_comes_again_in_its_shard_is_refused(tmp_path, make_tar, plain):
    twice = make_tar(tmp_path / "twice.tar", [*plain(0, 2), *plain(0, 1)])
    assert "key '0000' again at byte" in fault(twice)
    apart = make_tar(tmp_path / "apart.tar", [("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", IMAGE), ("b.jpg", IMAGE)])
    assert (
        "the parts of sample 'a' stand apart: .cls at byte 0, .jpg at byte 2048; a sample's files stand together "
        "(tar --sort=name"
    ) in fault(apart)
    apart = make_tar(tmp_path / "apart.tar", [*plain(0, 2), ("0000.txt", b"caption")])
    assert "the members of a sample stand together" in fault(apart)
    adjacent = make_tar(tmp_path / "adjacent.tar", [*plain(0, 1), *plain(0, 1)])
    assert "member '0000.cls' twice" in fault(adjacent)


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([("a.jpg", IMAGE)], "sample 'a' at byte 0 has no label: members jpg"),
        ([("a.cls", b"1")], "sample 'a' at byte 0 has no image: members cls"),
        ([("a.v2.jpg", IMAGE), ("a.cls", b"1")], "WebDataset cuts a name at its first dot"),
        ([("a.cls", b"1"), ("a.jpg", IMAGE), ("a.png", IMAGE)], "more than one image"),
        ([("a.tif", IMAGE)], "sample 'a' at byte 0 has no image: members tif"),
        ([("a.jpeg.JPG", IMAGE), ("a.jpeg.cls", b"1")], "has no image: members jpeg.jpg, jpeg.cls"),
        ([], "holds no samples and no files; a sample is an image, KEY.jpg|jpeg|png|webp, and its label"),
        ([("a", b"", {"type": tarfile.DIRTYPE})], "holds no samples and no files"),
        ([("a.txt", b"a cat"), ("b.txt", b"")], "no samples: passed over 2 files, the first 'a.txt' at byte 0; a sam"),
    ],
)
def test_a_sample_that_lacks_a_member_is_refused(tmp_path, members, found, make_tar):
    assert found in fault(make_tar(tmp_path / "a.tar", members))


@pytest.mark.parametrize(
    ("name", "fields", "found"),
    [
        ("/etc/a.jpg", {}, "absolute names"),
        ("../a.jpg", {}, "'..'"),
        ("a/../../b.jpg", {}, "'..'"),
        ("a\\b.jpg", {}, "backslashes"),
        ("a\nb.jpg", {}, "control characters"),
        ("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link, of which tar -h"),
        ("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "b.jpg"}, "is a link, of which tar -h"),
        ("a.jpg", {"type": tarfile.CHRTYPE}, "is no file; samples are plain"),
        ("a.jpg", {"type": tarfile.FIFOTYPE}, "is no file; samples are plain"),
        ("a.jpg", {"type": b"Z"}, "is no file; samples are plain"),
    ],
)
def test_a_member_that_is_no_plain_file_of_a_sample_is_refused(tmp_path, name, fields, found, make_tar, plain):
    path = make_tar(tmp_path / "a.tar", [*plain(0, 1), (name, b"", fields)])
    assert found in fault(path)


def test_a_global_header_that_later_bytes_depend_on_is_refused(tmp_path, make_tar, plain):
    make_tar(tmp_path / "a.tar", plain(0, 1), format=tarfile.PAX_FORMAT, pax_headers={"path": "b.jpg"})
    assert "global PAX header sets path" in fault(tmp_path / "a.tar")
    make_tar(tmp_path / "b.tar", plain(0, 1), format=tarfile.PAX_FORMAT, pax_headers={"comment": "git"})
    assert scan_shard(str(tmp_path / "b.tar")).entry.offsets.tolist() == [2]
    # In the middle it would be the last of a sample's bytes.
    first, rest = (make_tar(tmp_path / f"{n}.tar", plain(n, 1)).read_bytes() for n in (0, 1))
    first = first[: 7 * 512]
    between = tarfile.TarInfo.create_pax_global_header({"comment": "git"})
    (tmp_path / "c.tar").write_bytes(first + rest)
    assert scan_shard(str(tmp_path / "c.tar")).entry.offsets.tolist() == [0, 7]
    (tmp_path / "c.tar").write_bytes(first + between + rest)
    assert "global PAX header at byte 3584, behind the first member" in fault(tmp_path / "c.tar")


def test_names_are_utf8_whatever_the_locale(tmp_path, make_tar, monkeypatch):
    names = [("ü.cls", b"1"), ("ü.jpg", IMAGE)]
    make_tar(tmp_path / "a.tar", names, format=tarfile.GNU_FORMAT, encoding="utf-8")
    monkeypatch.setattr(tarfile.TarFile, "encoding", "iso8859-1")
    assert scan_shard(str(tmp_path / "a.tar")).entry.key_hashes.tolist() == [zlib.crc32("ü".encode())]


def test_names_that_are_no_utf8_are_read_and_shown_escaped(tmp_path, make_tar):
    members = [("caf\udce9.cls", b"1"), ("caf\udce9.jpg", IMAGE)]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = make_tar(tmp_path / "a.tar", members, format=form)
        index = Index.open(index_shards([path], workers=1))
        assert index.key_hash([0]).tolist() == [zlib.crc32(b"caf\xe9")]
        chunk = Chunk(np.arange(1))
        chunk.locate(index, ShardReader())
        chunk.read(Counters())
        assert chunk.take(0) == read_image(index, 0) == ("caf\udce9", IMAGE)
        figures = survey(index).figures()
        assert "key 'caf\\udce9'" in survey_text(figures)
        assert "\\udce9" in json.dumps([figures, locate(index, 0)])
        with pytest.raises(InputError, match=r"sample 'caf\\udce9' at byte 0: .jpg cannot be decoded"):
            verify(index, workers=1)
    twice = make_tar(tmp_path / "twice.tar", [*members, *members], format=tarfile.PAX_FORMAT)
    assert "member 'caf\\udce9.cls' twice" in fault(twice)


def test_what_is_no_plain_tar_is_told_for_what_it_is(tmp_path, make_tar, plain):
    path = tmp_path / "b.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert "compressed with gzip" in fault(path)
    joined = make_tar(tmp_path / "a.tar", plain(0, 1)).read_bytes() * 2
    for data, found in (
        (joined, "which readers never see"),
        (b"xyz\1" * 2000, "not a tar archive"),
        (b"PK\3\4" + bytes(3000), "not a tar archive: it is a zip archive"),
        (b"<!DOCTYPE html>\n<title>404</title>", "not a tar archive: it is a web page or a server's error message"),
        (b"\n<html>" + bytes(3000), "it is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a server's error message"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
        (b"404: Not Found", "truncated: 14 bytes ('404: Not Found')"),
        (b"", "truncated: 0 bytes"),
        (bytes(10240), "holds no samples and no files"),
    ):
        path.write_bytes(data)
        assert found in fault(path)


def test_a_sparse_member_is_told_as_one(tmp_path):
    """As GNU tar writes them with --sparse, in the formats it has for them."""
    hole = tmp_path / "0.jpg"
    with open(hole, "wb") as file:
        file.truncate(1 << 20)
        file.seek((1 << 20) - 5)
        file.write(b"whole")
    (tmp_path / "0.cls").write_bytes(b"1")
    for form in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={form}", "-C", tmp_path, "-cf", tmp_path / "a.tar", "0.jpg", "0.cls"]
        subprocess.run(command, check=True)
        assert "member '0.jpg' at byte 0 is stored sparse, its zeros left out" in fault(tmp_path / "a.tar")


# What a Mac's tar, a file manager and a careful author leave in a tar; (name, fields) that hold no sample.
JUNK = [
    ("._0000.jpg", {}),
    (".DS_Store", {}),
    ("README", {}),
    ("LICENSE.md", {}),
    ("a/Thumbs.db", {}),
    ("train/.hidden.cls", {}),
    ("latest", {"type": tarfile.SYMTYPE, "linkname": "0000.jpg"}),
    ("/etc/motd", {}),
    ("caf\udce9.txt", {}),
]


@pytest.mark.parametrize("form", ["USTAR", "PAX", "GNU"])
def test_what_can_hold_no_sample_is_passed_over_by_index_and_readers_alike(form, tmp_path, make_tar, plain, capsys):
    samples = plain(0, 3)
    junk = [(name, b"junk", fields) if not fields else (name, b"", fields) for name, fields in JUNK]
    # Before, between, behind and, where they have no suffix, inside the samples.
    members = [*junk[:5], samples[0], junk[0], junk[1], *samples[1:4], *junk[3:], *samples[4:], *junk[2:]]
    format = getattr(tarfile, f"{form}_FORMAT")
    make_tar(tmp_path / "b.tar", plain(9, 1), format=format)
    path = make_tar(tmp_path / "a.tar", members, format=format)
    index = Index.open(index_shards([path, tmp_path / "b.tar"], workers=1))
    count = len(members) - len(samples)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"note: passed over {count} files that can hold no sample, the first '._0000.jpg' at byte 0 of {path}"
    )
    assert index.samples == 4
    chunk = Chunk(np.arange(4))
    chunk.locate(index, ShardReader())
    chunk.read(Counters())
    images = [data for name, data in [*samples, *plain(9, 1)] if name.endswith(".jpg")]
    expected = list(zip(("0000", "0001", "0002", "0009"), images, strict=True))
    assert [chunk.take(row) for row in range(4)] == expected
    assert [read_image(index, row) for row in range(4)] == expected
    found = [sample for sample in tarfile_samples([{"url": str(path)}]) if "jpg" in sample]
    assert [(sample["__key__"], sample["jpg"]) for sample in found] == expected[:3]


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
        assert key_and_suffix(name) == (None if key is None else (key, suffix.lower()))
