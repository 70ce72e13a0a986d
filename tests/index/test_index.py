"""The index: lookups by canonical id, concatenation, and an open that maps rather than reads."""

import json
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.index.index import Index, SampleExtent
from pretrain.index.indexfile import INDEX_NAME, place_arrays
from pretrain.shards.indexwriter import write_index
from pretrain.stream.order import Order
from tests.index.entries import SINGLE, as_first_version, entry

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_and_its_index_file_open_alike(single):
    for path in (single, str(single), single / INDEX_NAME, [single]):
        index = Index.open(path)
        assert (index.samples, index.num_classes, index.multilabel) == (9, 8, False)
        assert index.classes == tuple(f"class {n}" for n in range(8))
    assert len(index.hash) == 64


def test_single_labels_come_as_one_column(single):
    labels = Index.open(single).labels(np.array([8, 0, 4]))
    assert labels.dtype == np.int64
    assert labels.tolist() == [[0], [3], [1]]


def test_label_lists_are_padded_to_the_longest(lists):
    index = Index.open(lists)
    assert (index.multilabel, index.num_classes) == (True, 12)
    assert index.labels([0, 1, 2]).tolist() == [[4, 9], [-1, -1], [2, 11]]


def test_a_list_of_exactly_one_label_is_one_label(tmp_path, single, lists):
    write_index(tmp_path / "ones.vfi", [entry("d.tar", [0, 6, 8], 11, [4, 9, 2], counts=[1, 1, 1])])
    ones = Index.open(tmp_path / "ones.vfi")
    assert (ones.multilabel, ones.one_label, ones.labels([1, 0]).tolist()) == (True, True, [[9], [4]])
    assert Index.open([single, tmp_path / "ones.vfi"]).one_label
    assert not Index.open(lists).one_label
    write_index(tmp_path / "gap.vfi", [entry("d.tar", [0, 6, 8], 11, [4, 2], counts=[1, 0, 1])])
    assert not Index.open(tmp_path / "gap.vfi").one_label


def test_key_hashes_are_the_crc32_of_the_keys(single):
    hashes = Index.open(single).key_hash(np.array([5, 0]))
    assert hashes.dtype == np.uint32
    assert hashes.tolist() == [zlib.crc32(b"k5"), zlib.crc32(b"k0")]


def test_indices_that_number_classes_otherwise_are_refused(single, tmp_path):
    def named(*names):
        path = tmp_path / "other.vfi"
        write_index(path, [entry("e.tar", [0, 7], 9, [0, 1], first_key=12)], classes=list(names))
        return path

    Index.open([single, named(*(f"class {n}" for n in range(8)))])
    with pytest.raises(InputError, match="class 1 is 'class 2' here and 'class 1' in "):
        Index.open([single, named("class 0", "class 2")])
    with pytest.raises(InputError, match="class 2 is absent here and 'class 2' in"):
        Index.open([single, named("class 0", "class 1")])


def test_an_impossible_place_is_refused_before_memory_is_taken_for_it(single):
    index = Index.open(single)
    with open(index.files[0].path, "r+b") as raw:
        raw.seek(index.files[0]._starts["offsets"] + 4)
        raw.write((1 << 31).to_bytes(4, "little"))
    with pytest.raises(InputError, match="damaged: ids 0 to 0 in bytes 0-1099511627776"):
        Index.open(single).extents([0])


def test_a_run_of_ids_is_one_extent_up_to_the_next_sample(single):
    index = Index.open(single)
    assert index.extents(np.array([0, 1])) == [SampleExtent(str(single / "a.tar"), 0, 9 * 512, "", 16384, 0, 2)]
    assert index.extents([6]) == [SampleExtent(str(single / "c.tar"), 3 * 512, 6 * 512, "", 16384, 6, 1)]


def test_the_last_sample_of_a_shard_ends_where_its_data_ends(single):
    index = Index.open(single)
    assert index.extents([2]) == [SampleExtent(str(single / "a.tar"), 9 * 512, 12 * 512, "", 16384, 2, 1)]
    assert index.extents([8])[0].end == 12 * 512


def test_a_run_splits_at_shard_borders(single):
    found = Index.open(single).extents(np.arange(1, 7))
    assert [(Path(e.url).name, e.begin // 512, e.end // 512, e.first_id, e.count) for e in found] == [
        ("a.tar", 4, 12, 1, 2),
        ("b.tar", 2, 8, 3, 2),
        ("c.tar", 0, 6, 5, 2),
    ]


def test_extents_keep_the_order_of_the_runs(single):
    found = Index.open(single).extents(np.array([7, 8, 0, 1, 5, 4]))
    assert [(e.first_id, e.count) for e in found] == [(7, 2), (0, 2), (5, 1), (4, 1)]
    assert Index.open(single).extents(np.array([], np.int64)) == []


@pytest.mark.parametrize("ids", [[-1], [9], [0, 100]])
def test_an_id_outside_the_index_is_refused(single, ids):
    index = Index.open(single)
    for lookup in (index.labels, index.key_hash, index.extents):
        with pytest.raises(IndexError, match=r"outside 0 … 8"):
            lookup(np.array(ids))


def test_concatenated_indices_run_on_in_canonical_ids(single, lists):
    index = Index.open([lists, single])
    assert (index.samples, index.num_classes, index.multilabel) == (12, 12, True)
    assert index.labels([11, 2, 3, 1]).tolist() == [[0, -1], [2, 11], [3, -1], [-1, -1]]
    assert index.key_hash([3, 0]).tolist() == [zlib.crc32(b"k0"), zlib.crc32(b"k9")]
    found = index.extents(np.arange(1, 7))
    assert [(e.url, e.first_id, e.count) for e in found] == [
        (str(lists / "d.tar"), 1, 2),
        (str(single / "a.tar"), 3, 3),
        (str(single / "b.tar"), 6, 1),
    ]
    assert [(s.first_id, s.samples) for s in index.shards] == [(0, 3), (3, 3), (6, 2), (8, 4)]


def test_a_concatenation_has_a_hash_of_its_own_that_knows_the_order(single, lists):
    hashes = {Index.open(paths).hash for paths in (single, lists, [single, lists], [lists, single])}
    assert len(hashes) == 4
    assert Index.open([single]).hash == Index.open(single).hash


def test_random_lookups_agree_with_a_table_of_all_samples(single, lists, tmp_path):
    write_index(tmp_path / "third.vfi", [entry("e.tar", [0, 7], 9, [6, 1], first_key=12)])
    index = Index.open([single, lists, tmp_path / "third.vfi"])
    everything = np.arange(index.samples)
    labels, keys = index.labels(everything), index.key_hash(everything)
    ids = np.random.default_rng(0).integers(0, index.samples, 200)
    assert (index.labels(ids) == labels[ids]).all()
    assert (index.key_hash(ids) == keys[ids]).all()
    assert [e.first_id for e in index.extents(ids[:1])] == [int(ids[0])]


def test_the_histogram_counts_every_label(single, lists):
    assert Index.open(single).histogram().tolist() == [2, 2, 1, 1, 0, 2, 0, 1]
    assert Index.open([single, lists]).histogram()[[4, 9, 11]].tolist() == [1, 1, 1]


def test_the_hash_of_the_sequence_covers_what_fixes_it_and_nothing_else(tmp_path):
    def hash_of(*entries):
        write_index(tmp_path / INDEX_NAME, entries)
        return Index.open(tmp_path).sequence

    plain = hash_of(entry("a", [0, 4], 8, [1, 2]))
    # Pinned: runs in progress hold this hash in their checkpoints.
    assert plain == "89c2dceaf980ffb6dcdfd400fe6e7e56f4ee92013873b6d04a9005fab137176b"
    assert hash_of(entry("elsewhere/b", [0, 4], 8, [1, 2])) == plain
    assert Index.open(tmp_path).files[0].rehash() == plain
    others = [
        hash_of(entry("a", [0, 5], 8, [1, 2])),
        hash_of(entry("a", [0, 4], 8, [1, 3])),
        hash_of(entry("a", [0, 4], 8, [1, 2], first_key=1)),
        hash_of(entry("a", [0, 4], 8, [1, 2], counts=[1, 1])),
        hash_of(entry("a", [0, 4], 8, [1, 2], counts=[2, 0])),
        hash_of(entry("a", [0], 4, [1]), entry("b", [4], 8, [2], first_key=1)),
    ]
    assert len({plain, *others}) == 7


def test_the_hash_is_recomputed_from_lists_as_it_was_written(single, lists):
    for folder in (single, lists):
        index = Index.open(folder)
        assert index.files[0].rehash() == index.sequence != index.hash


def test_the_hash_holds_the_content_of_every_shard_whose_sha256_is_recorded(tmp_path):
    def opened(*digests):
        rows = [entry("a", [0, 4], 8, [1, 2]), entry("b", [0], 4, [3], first_key=2)]
        write_index(tmp_path / INDEX_NAME, [replace(row, digest=to) for row, to in zip(rows, digests, strict=True)])
        index = Index.open(tmp_path)
        index.check_content()
        return index

    known, other, half, etags, nothing = (
        opened(*digests)
        for digests in (
            ("sha256:1", "sha256:2"),
            ("sha256:1", "sha256:3"),
            ("sha256:1", "etag:2"),
            ("etag:1", "etag:2"),
            ("", ""),
        )
    )
    assert len({index.sequence for index in (known, other, half, etags, nothing)}) == 1
    assert len({index.hash for index in (known, other, half, nothing)}) == 4
    assert etags.hash == nothing.hash == nothing.sequence  # a copy has other etags
    assert opened("sha256:1 etag:7", "sha256:2").hash == known.hash
    assert (known.unhashed(), half.content) == ("", {"sha256": 1, "etag": 1, "unknown": 0})
    assert half.unhashed().startswith("sha256 of 1, etag of 1 shards; not all of it is in the hash")
    assert nothing.unhashed().startswith("unknown of 2 shards; ")


def test_an_index_of_the_first_version_has_the_hash_of_now_by_its_digests(single, lists):
    """Its own is that of the sequence, which checkpoints of runs under way hold: `Order.check` takes that too."""
    now = [Index.open(folder) for folder in (single, lists)]
    for folder in (single, lists):
        as_first_version(folder / INDEX_NAME)
    old = [Index.open(folder) for folder in (single, lists)]
    assert [(index.hash, index.sequence) for index in old] == [(index.hash, index.sequence) for index in now]
    assert all(index.hash != index.sequence for index in old)
    both, order = Index.open([single, lists]), Order(1000, 10, seed=1)
    for began in (both.hash, both.sequence):
        assert order.check(order.state(began, 5), both.hash, both.sequence) == 5
    for index in old:
        index.check_content()
        assert not index.unhashed()


def test_a_moved_folder_still_opens(single, tmp_path):
    shutil.move(single, tmp_path / "elsewhere")
    index = Index.open(tmp_path / "elsewhere")
    assert index.shards[1].url == str(tmp_path / "elsewhere" / "b.tar")
    assert index.extents([3])[0].url == str(tmp_path / "elsewhere" / "b.tar")


def test_the_shard_table_tells_sizes_and_digests(single):
    shard = Index.open(single).shards[2]
    assert (shard.samples, shard.bytes, shard.data_end, shard.first_id) == (4, 12 * 512 + 10240, 12 * 512, 5)
    assert shard.digest == "sha256:c.tar"


def test_a_folder_without_an_index_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(InputError, match=f"python launch/shards.py index {tmp_path}$"):
        Index.open(tmp_path)


def test_a_missing_path_an_empty_list_and_a_url_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such index"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no index given"):
        Index.open([])
    with pytest.raises(InputError, match="copy it to a local disk"):
        Index.open("s3://bucket/index.vfi")


def test_checking_the_files_names_the_first_shard_missing_or_of_another_size(single):
    for shard in SINGLE:
        (single / shard.url).write_bytes(bytes(shard.bytes))
    Index.open(single).check_files()
    (single / "c.tar").unlink()
    with pytest.raises(InputError, match=r"c\.tar: No such file"):
        Index.open(single).check_files()
    (single / "b.tar").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"b\.tar: truncated: 100 bytes, the index says 14336"):
        Index.open(single).check_files()
    (single / "a.tar").write_bytes(bytes(20000))
    with pytest.raises(InputError, match=r"a\.tar: changed: 20000 bytes"):
        Index.open(single).check_files()


def test_an_index_without_samples_is_not_written(tmp_path):
    with pytest.raises(InputError, match="no samples"):
        write_index(tmp_path / INDEX_NAME, [])
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_is_a_link_belongs_to_the_folder_of_the_link(single, tmp_path):
    blob = tmp_path / "blob"
    shutil.move(single / INDEX_NAME, blob)
    (single / INDEX_NAME).symlink_to(blob)
    assert Index.open(single).shards[0].url == str(single / "a.tar")


_PROBE = """
import sys, time
import numpy as np
from pretrain.index.index import Index

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

Index.open(sys.argv[1]).labels(np.arange(3))
before, start = anonymous(), time.perf_counter()
index = Index.open([sys.argv[1]] * 2)
seconds = time.perf_counter() - start
ids = (np.arange(4096) * 73_241) % index.samples
index.labels(ids), index.key_hash(ids), index.extents(np.sort(ids)), index.shards[10_000]
print(seconds, anonymous() - before, index.samples)
"""


def test_three_hundred_million_samples_open_at_once_with_little_memory(tmp_path):
    samples, shards = 300_000_000, 30_000
    names = [f"shard-{number:06d}.tar" for number in range(shards)]
    blob = "".join(names).encode()
    arrays = {
        "first": np.linspace(0, samples, shards + 1).astype("<i8"),
        "shard_bytes": np.full(shards, 1 << 30),
        "data_end": np.full(shards, 1 << 29),
        "url_ends": np.arange(shards + 1) * len(names[0]),
        "urls": np.frombuffer(blob, "u1"),
        "digest_ends": np.zeros(shards + 1, "<i8"),
        "digests": np.zeros(0, "u1"),
    }
    lengths = {name: (array.dtype.str, len(array)) for name, array in arrays.items()}
    lengths |= dict.fromkeys(("offsets", "key_hashes"), ("<u4", samples)) | {"labels": ("<i4", samples)}
    header = {"version": 1, "samples": samples, "shards": shards, "num_classes": 1, "multilabel": False}
    header |= {"longest": 1, "classes": None, "hash": "0" * 64}
    start, size = place_arrays(header, lengths)
    table = json.loads(start[16 : 16 + int.from_bytes(start[8:16], "little")])["arrays"]
    with open(tmp_path / INDEX_NAME, "wb") as file:
        file.write(start)
        for name, array in arrays.items():
            file.seek(len(start) + table[name][2])
            file.write(array.tobytes())
        file.truncate(size)  # the 3.6 GB of samples are a hole

    probe = subprocess.run(
        [sys.executable, "-c", _PROBE, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, anonymous, found = probe.stdout.split()
    assert int(found) == 2 * samples
    assert float(seconds) < 1
    assert int(anonymous) < 16 << 20
