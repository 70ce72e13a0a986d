"""The index file: whatever is cut, foreign or flipped in it is refused."""

import os
import re

import pytest

from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME
from tests.index.entries import change_header


@pytest.mark.parametrize("name", ["offsets", "key_hashes", "labels", "digests"])
def test_one_flipped_bit_is_found(single, name):
    index = Index.open(single)
    index.check_content()
    file = index.files[0]
    with open(file.path, "r+b") as raw:
        raw.seek(file._starts[name] + 8)
        (byte,) = raw.read(1)
        raw.seek(-1, os.SEEK_CUR)
        raw.write(bytes([byte ^ 0x80]))
    with pytest.raises(InputError, match=f"{file.path}: damaged: its (arrays|digests) hash to"):
        Index.open(single).check_content()


@pytest.mark.parametrize(("name", "value"), [("data_end", 9 * 512), ("data_end", 1 << 40), ("shard_bytes", 4096)])
def test_shards_that_end_where_they_cannot_are_found(single, name, value):
    """The hash is of the samples' sequence, which they are no part of."""
    index = Index.open(single)
    with open(index.files[0].path, "r+b") as raw:
        raw.seek(index.files[0]._starts[name])
        raw.write(value.to_bytes(8, "little"))
    with pytest.raises(InputError, match=r"index\.vfi: damaged: .* of shard 0 begin at byte 4608 at the latest"):
        Index.open(single).check_content()


def test_an_index_cut_anywhere_is_refused(single, tmp_path):
    whole = (single / INDEX_NAME).read_bytes()
    for length in {0, 3, 8, 12, 16, 200, *range(300, len(whole), 64), len(whole) - 1}:
        (tmp_path / "cut.vfi").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not an index" if not length else "truncated"):
            Index.open(tmp_path / "cut.vfi")
    (tmp_path / "long.vfi").write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="too long"):
        Index.open(tmp_path / "long.vfi")


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"PK\x03\x04", " but a zip archive, as .npz and PyTorch's .pt files are"),
        ((1234).to_bytes(8, "little") + b'{"__metadata__"', " but a safetensors file"),
        (b"\x1f\x8b\x08", " but compressed with gzip"),
        (b'\xef\xbb\xbf{"name": "pretrain"}', " but a JSON text"),
        (b"\x01\x02", ""),
    ],
)
def test_a_foreign_file_is_refused_as_what_it_is(tmp_path, start, kind):
    (tmp_path / "other").write_bytes(start + (b" " if b"{" in start else b"\0") * 1000)
    with pytest.raises(InputError, match=f"/other: not an index{re.escape(kind)}; an index is made with: .* SHARDS"):
        Index.open(tmp_path / "other")


def test_a_shard_in_the_place_of_an_index_names_the_command_that_makes_one(tmp_path, make_tar, plain):
    path = make_tar(tmp_path / "a.tar", plain(0, 1))
    with pytest.raises(InputError, match=f"a.tar: not an index but a tar archive; .*launch/shards.py index {path}$"):
        Index.open(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": 3}, "index version 3; this program reads versions up to 2"),
        ({"samples": 8}, "counts contradict each other"),
        ({"arrays": {}}, "damaged header"),
        ({"shards": 2}, "counts contradict each other"),
        ({"longest": -1}, "damaged header"),
        ({"num_classes": "7"}, "damaged header"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(single, change, found):
    path = single / INDEX_NAME
    change_header(path, **change)
    with pytest.raises(InputError, match=found):
        Index.open(path)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_whatever_bit_of_a_header_flips_it_is_refused_or_says_the_same(single, every):
    def said(index):
        (file,) = index.files
        kept = {name: value for name, value in vars(file).items() if name not in ("_mapped", "path")}
        return {name: repr(value) for name, value in kept.items()}

    path = single / INDEX_NAME
    whole = path.read_bytes()
    expected, refused = said(Index.open(path)), 0
    for bit in range(0, 8 * (16 + int.from_bytes(whole[8:16], "little")), every):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert said(Index.open(path)) == expected
        except InputError:
            refused += 1
    assert refused > 4000 // every
