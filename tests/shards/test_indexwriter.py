"""What an index is made of waits on disk: in order, sorted there, and never in memory."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.index.indexfile import INDEX_NAME, IndexFile
from pretrain.shards import column, keys
from pretrain.shards.column import Column
from pretrain.shards.indexwriter import IndexWriter, ShardEntry, write_index
from pretrain.shards.keys import KeyHashes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(column, "_PIECE", 3)


def entry(number, labels, counts=None):
    samples = len(labels) if counts is None else len(counts)
    return ShardEntry(
        url=f"s3://bucket/{number}.tar",
        bytes=10**6,
        data_end=10**6 - 1024,
        offsets=np.arange(samples, dtype=np.uint32),
        key_hashes=np.arange(samples, dtype=np.uint32) + 100 * number,
        labels=np.array(labels, np.int32),
        label_counts=None if counts is None else np.array(counts, np.uint32),
    )


def test_a_column_is_its_parts_in_order(small_pieces, tmp_path):
    for length in range(12):
        grown = Column("<u4", tmp_path)
        for part in np.array_split(np.arange(length), 3):
            grown.append(part)
        assert (len(grown), grown.array().tolist()) == (length, list(range(length)))
        assert np.concatenate([[], *grown.pieces()]).tolist() == list(range(length))
        pairs = [pair for piece in grown.pieces(overlap=1) for pair in itertools.pairwise(piece.tolist())]
        assert pairs == list(itertools.pairwise(range(length)))
        grown.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("elements", [10, 1 << 20], ids=["as it is read", "as it is filled"])
def test_a_disk_that_is_full_is_told(elements, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "r+b"))  # noqa: SIM115
    grown = Column("<u4", tmp_path)

    def fill():
        grown.append(np.arange(elements))
        grown.array()

    with pytest.raises(InputError, match=f"^{tmp_path}: temporary files cannot be written: No space left on device$"):
        fill()
    grown.close()


@pytest.mark.parametrize("lists", [False, True])
def test_pieces_of_any_size_write_the_same_index(tmp_path, monkeypatch, lists):
    entries = [entry(0, [1, 2, 3, 4]), entry(1, [7, 5, 6, 0, 0], [2, 0, 0, 3] if lists else None), entry(2, [3])]
    whole = write_index(tmp_path / "whole.vfi", entries)
    monkeypatch.setattr(column, "_PIECE", 2)
    assert write_index(tmp_path / "pieces.vfi", entries) == whole == IndexFile(tmp_path / "pieces.vfi").rehash()
    assert (tmp_path / "pieces.vfi").read_bytes() == (tmp_path / "whole.vfi").read_bytes()


def test_a_hash_that_comes_again_is_found_wherever_it_stands(small_pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "_key_at", lambda shard, begin: f"key of {hashes[begin // 512]}")
    random = np.random.default_rng(0)
    for trial in range(60):
        hashes = random.integers(0, 1 << 64, 17, dtype=np.uint64)
        first, second = sorted(random.choice(17, 2, replace=False).tolist())
        if trial % 2:
            hashes[second] = hashes[first]
        with KeyHashes(tmp_path) as seen:
            for part in np.split(hashes, [5, 6, 11]):
                seen.add(part)
            if not trial % 2:
                seen.refuse_shared(list("abcd"), np.arange(17))
                continue
            of = ["abcd"[int(np.searchsorted([5, 6, 11], place, side="right"))] for place in (first, second)]
            with pytest.raises(InputError) as error:
                seen.refuse_shared(list("abcd"), np.arange(17))
            expected = f"{of[1]}: key 'key of {hashes[first]}' at byte {second * 512} also occurs in {of[0]}; "
            assert str(error.value).startswith(expected)


def test_a_writer_that_is_left_leaves_nothing(tmp_path):
    with IndexWriter(tmp_path / INDEX_NAME) as writer:
        writer.add(entry(0, [1, 2]))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"/nowhere: temporary files cannot be written: No such file"):
        IndexWriter(tmp_path / "nowhere" / INDEX_NAME)


_PROBE = """
import sys
from pathlib import Path
import numpy as np
from pretrain.shards import scan
from pretrain.shards.indexwriter import ShardEntry

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

samples, peak = 3000, 0
def scans(work, jobs, **options):
    global peak
    random = np.random.default_rng(0)
    for job in jobs:
        words = random.integers(0, 1 << 32, samples, dtype=np.uint32)
        hashes = random.integers(0, 1 << 64, samples, dtype=np.uint64)
        yield scan.ShardScan(ShardEntry(job.url, 1 << 30, 1 << 29, words, words, words.view(np.int32) >> 20), hashes)
    peak = anonymous()

class Writer(scan.IndexWriter):
    def sequence(self):
        global peak
        found = super().sequence()
        peak = max(peak, anonymous())
        return found

scan.map_shards, scan.IndexWriter = scans, Writer
scan.expand = lambda patterns: [f"s3://bucket/{number:06d}.tar" for number in range(int(sys.argv[2]) // samples)]
scan.index_shards([], Path(sys.argv[1]) / "index.vfi")
print(max(peak, anonymous()))
"""


def test_ten_times_the_samples_take_no_more_memory(tmp_path):
    peaks = []
    for samples in (300_000, 3_000_000):
        command = [sys.executable, "-c", _PROBE, tmp_path, str(samples)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert IndexFile(tmp_path / "index.vfi").samples == samples
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 8 << 20  # all scans in memory: 70 MB more
