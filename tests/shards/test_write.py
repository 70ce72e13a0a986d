"""Shards being written: shuffled over the whole set, byte for byte the same, and whole or not there."""

import io
import json
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pretrain.datasets.dataset import Dataset, array_dataset
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME
from pretrain.shards.scan import index_shards
from pretrain.shards.verify import verify
from pretrain.shards.write import RECIPE_NAME, ShardLayout, shuffled_rows, write_shards

CLASSES = ("one", "two", "three")


def pictures(rows=40, seed=0):
    """A data set of small grey pictures, sorted by class as folders are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 6, 5), np.uint8)
    return array_dataset("pictures", "train", pixels, np.arange(rows) * 3 // rows, CLASSES), pixels


def listed(labels):
    """A data set whose rows have lists of labels."""
    flat = np.array([label for row in labels for label in row], np.int32)
    starts = np.cumsum([0, *map(len, labels)])
    return Dataset("listed", "all", flat, starts, None, "f", lambda row: ("jpg", b"\xff\xd8" + bytes([row])))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def read_back(folder):
    """The samples as webdataset's own reader yields them."""
    urls = [shard.url for shard in Index.open(folder).shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def test_two_builds_give_the_same_bytes(tmp_path):
    data, _ = pictures()
    for name in ("one", "two"):
        write_shards(data, tmp_path / name, ShardLayout(samples=16))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    write_shards(data, tmp_path / "other", ShardLayout(seed=1, samples=16))
    names = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    for name in names:
        assert contents(tmp_path / "other")[name] != contents(tmp_path / "one")[name]


def test_webdataset_reads_back_every_picture_with_its_label(tmp_path):
    data, pixels = pictures()
    path, written = write_shards(data, tmp_path / "s", ShardLayout(samples=16))
    assert (path, written) == (tmp_path / "s" / INDEX_NAME, True)
    samples = read_back(tmp_path / "s")
    assert sorted(int(sample["__key__"]) for sample in samples) == list(range(40))
    for sample in samples:
        row = int(sample["__key__"])
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.mode == "L"
        assert (np.asarray(image) == pixels[row]).all()
        assert int(sample["cls"]) == row * 3 // 40


def test_the_index_written_on_the_way_is_the_one_a_scan_finds(tmp_path):
    data, _ = pictures()
    write_shards(data, tmp_path / "s", ShardLayout(samples=16))
    built = Index.open(tmp_path / "s")
    assert built.classes == CLASSES
    built.check_files()
    assert verify(built).without_digest == 0
    scanned = Index.open(index_shards([tmp_path / "s"], tmp_path / "again.vfi"))
    assert scanned.hash == built.hash
    assert list(scanned.shards) == list(built.shards)


def test_samples_are_shuffled_over_all_shards(tmp_path):
    data, _ = pictures(rows=600)
    write_shards(data, tmp_path / "s", ShardLayout(samples=100))
    index = Index.open(tmp_path / "s")
    assert [shard.samples for shard in index.shards] == [100] * 6
    for shard in index.shards:
        labels = index.labels(np.arange(shard.first_id, shard.first_id + shard.samples))[:, 0]
        assert min(Counter(labels.tolist()).values()) > 15  # of 33 expected of each class


def test_the_shuffle_is_a_pinned_permutation():
    # Pinned: shards built tomorrow have to be those built today.
    assert shuffled_rows(10, 0).tolist() == [9, 7, 3, 8, 1, 6, 5, 0, 4, 2]
    assert sorted(shuffled_rows(1000, 3)) == list(range(1000))


def test_shards_hold_at_most_the_bytes_and_samples_asked_for(tmp_path):
    data, _ = pictures()
    write_shards(data, tmp_path / "s", ShardLayout(bytes=20_000))
    shards = list(Index.open(tmp_path / "s").shards)
    assert len(shards) > 3
    assert all(shard.data_end <= 20_000 for shard in shards)
    # A sample larger than that has a shard of its own.
    write_shards(data, tmp_path / "t", ShardLayout(bytes=1))
    assert [shard.samples for shard in Index.open(tmp_path / "t").shards] == [1] * 40


def test_label_lists_are_written_as_json(tmp_path):
    labels = [[4, 1], [], [0], [2, 3, 5]]
    write_shards(listed(labels), tmp_path / "s")
    index = Index.open(tmp_path / "s")
    samples = read_back(tmp_path / "s")
    for row, sample in zip(index.labels(np.arange(4)).tolist(), samples, strict=True):
        number = int(sample["__key__"])
        assert json.loads(sample["json"]) == labels[number] == [label for label in row if label >= 0]
        assert sample["jpg"] == b"\xff\xd8" + bytes([number])
    assert index_shards([tmp_path / "s"], tmp_path / "again.vfi")
    assert Index.open(tmp_path / "again.vfi").hash == index.hash


def test_a_folder_that_holds_this_already_is_left_as_it_is(tmp_path):
    data, _ = pictures()
    write_shards(data, tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()}
    path, written = write_shards(data, tmp_path / "s")
    assert (path, written) == (tmp_path / "s" / INDEX_NAME, False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir()} == before
    (tmp_path / "s" / "shard-000000.tar").unlink()
    with pytest.raises(InputError, match=r"shard-000000\.tar: No such file"):
        write_shards(data, tmp_path / "s")


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    data, _ = pictures()
    write_shards(data, tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(InputError, match=r"holds another data set .*samples is 40, asked for 20"):
        write_shards(pictures(rows=20)[0], tmp_path / "s")
    with pytest.raises(InputError, match="its images or labels differ"):
        write_shards(pictures(seed=1)[0], tmp_path / "s")
    with pytest.raises(InputError, match="seed is 0, asked for 5"):
        write_shards(data, tmp_path / "s", ShardLayout(seed=5))
    assert contents(tmp_path / "s") == before
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.tar").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"holds shards already \(mine\.tar\)"):
        write_shards(data, tmp_path / "t")
    assert contents(tmp_path / "t") == {"mine.tar": b"precious"}
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        write_shards(data, tmp_path / "file")


def cut(data, after, error):
    """The same data set, of which only some images can be read."""
    reads = iter(range(after))

    def failing(row):
        if next(reads, None) is None:
            raise error
        return data.read(row)

    return Dataset(data.name, data.split, data.labels, None, CLASSES, data.fingerprint, failing)


def test_a_build_that_was_killed_is_begun_again_whatever_the_source_is_by_then(tmp_path, monkeypatch):
    data, _ = pictures()
    whole = tmp_path / "whole"
    write_shards(data, whole, ShardLayout(samples=8))
    for name, then in (("same", data), ("other", pictures(seed=1)[0])):
        killed = cut(data, 29, InputError("cut off"))
        with monkeypatch.context() as process:
            process.setattr(Path, "unlink", lambda *arguments, **options: None)  # which clears nothing away
            with pytest.raises(InputError, match="cut off"):
                write_shards(killed, tmp_path / name, ShardLayout(samples=8), readers=1)
        assert {"shard-000000.tar", "shard-000001.tar", "shard-000002.tar"} < set(os.listdir(tmp_path / name))
        with pytest.raises(InputError):
            Index.open(tmp_path / name)
        (tmp_path / name / "shard-000009.tar").write_bytes(b"left over")
        write_shards(then, tmp_path / name, ShardLayout(samples=8))
        assert sorted(os.listdir(tmp_path / name)) == sorted(os.listdir(whole))
    assert contents(tmp_path / "same") == contents(whole)
    verify(Index.open(tmp_path / "other"), workers=1)


def test_a_build_that_failed_leaves_nothing(tmp_path):
    data, _ = pictures()
    for error in (InputError("the disk of the source"), OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises((InputError, KeyboardInterrupt)):
            write_shards(cut(data, 29, error), tmp_path / "s", ShardLayout(samples=8), readers=1)
        assert os.listdir(tmp_path / "s") == []
    write_shards(pictures(rows=20)[0], tmp_path / "s")


def test_shards_are_flushed_before_they_get_their_names(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor):
        steps.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def seen_replace(old, new):
        steps.append(("rename", Path(new).name))
        assert ("fsync", Path(old).name) in steps
        replace(old, new)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_shards(pictures()[0], tmp_path / "s", ShardLayout(samples=20))
    renamed = [name for kind, name in steps if kind == "rename"]
    assert renamed == ["shard-000000.tar", "shard-000001.tar", INDEX_NAME, RECIPE_NAME]
    assert steps[-1] == ("fsync", "s")


def test_only_a_few_images_are_in_memory_at_a_time(tmp_path):
    """The threads wait for a slow writer."""
    alive, most, lock = 0, 0, threading.Lock()

    class Counted(bytes):
        def __new__(cls, data):
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)
            return super().__new__(cls, data)

        def __del__(self):
            nonlocal alive
            with lock:
                alive -= 1

    labels = np.zeros(2000, np.int32)
    data = Dataset("many", "all", labels, None, None, "f", lambda row: ("jpg", Counted(b"\xff\xd8" * 300)))
    write_shards(data, tmp_path / "s", readers=4)
    assert most <= 2 * 4 + 4  # two a thread, and those being written


def test_a_label_outside_the_classes_is_refused_before_anything_is_written():
    with pytest.raises(InputError, match="label 3 is out of range; labels are 0 … 2"):
        array_dataset("x", "all", np.zeros((2, 4, 4), np.uint8), [0, 3], CLASSES)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"bytes": 0}, {"samples": 0}])
def test_a_layout_that_makes_no_shards_is_refused(wrong):
    with pytest.raises(InputError, match="would be right"):
        ShardLayout(**wrong)
