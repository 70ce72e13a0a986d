"""The figures of a data set: counted from its index, sizes of images from a few that are decoded."""

import json
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.index import indexfile
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME, place_arrays
from pretrain.shards.page import choose
from pretrain.shards.survey import locate, spread_ids, survey, survey_text


@pytest.mark.parametrize("piece", [None, 7])
def test_bytes_per_sample_are_those_of_every_extent(shards, lists, monkeypatch, piece):
    if piece:
        monkeypatch.setattr(indexfile, "_PIECE", piece)
    index = Index.open([shards.folder, lists.files[0].path, shards.folder])
    found = survey(index, images=1)
    expected = Counter(locate(index, number)["bytes"] for number in range(index.samples))
    assert {512 * size: count for size, count in enumerate(found.blocks.tolist()) if count} == expected
    sizes = sorted(expected.elements())
    figures = found.figures()["sample_bytes"]
    assert figures == {"min": sizes[0], "median": float(np.median(sizes)), "max": sizes[-1]}
    assert found.label_counts.tolist() == [15, 15 + 2 * 203, 15, 15]
    assert found.shard_samples.tolist() == [50, 37, 1, 64, 51, 25, 25, 10, 50, 37, 1, 64, 51]


def test_images_that_do_not_decode_are_counted_and_the_first_is_named(lists):
    found = survey(lists)
    figures = found.figures()["images"]
    assert (figures["read"], figures["unreadable"]) == (60, 3)
    assert (figures["width"]["min"], figures["height"]["min"], figures["height"]["max"]) == (300, 8, 10)
    assert figures["formats"] == {"PNG L": 57}
    bad = [number for number in range(60) if int(locate(lists, number)["key"]) % 20 == 13]
    assert [image.sample_id for image in found.unreadable] == bad
    place = locate(lists, bad[0])
    first = figures["first_unreadable"]
    assert {name: first[name] for name in ("id", "key", "shard", "offset")} == {
        name: place[name] for name in ("id", "key", "shard", "offset")
    }
    assert "not JPEG, PNG or WebP but a text: 8 bytes" in first["error"]
    assert f"unreadable 3 of 60; the first is id {bad[0]}, key {place['key']!r}" in survey_text(found.figures())
    json.dumps(found.figures())


def test_an_image_cut_in_its_data_is_unreadable_though_its_header_tells_a_size(write_shards, encoded):
    photo = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    made = write_shards("cut", [6], suffixes=("jpg",), replace={4: photo[: len(photo) // 2]})
    assert [image.sample_id for image in survey(made.index).unreadable] == [4]


def test_without_faults_nothing_is_unreadable(shards):
    figures = survey(shards.index).figures()
    assert (figures["images"]["unreadable"], figures["images"]["first_unreadable"]) == (0, None)
    assert "unreadable" not in survey_text(figures)


def test_a_shard_that_is_gone_ends_the_survey(write_shards):
    made = write_shards("gone", [5, 5])
    made.shard(1).unlink()
    with pytest.raises(InputError, match=r"shard-001\.tar"):
        survey(made.index)


def sparse_index(path, samples, shards, classes, damage=False):
    """An index whose samples are a hole: offsets and labels 0, so that each shard's last sample takes all of it."""
    arrays = {
        "first": np.linspace(0, samples, shards + 1).astype("<i8"),
        "shard_bytes": np.full(shards, 1 << 21),
        "data_end": np.full(shards, 1 << 20),
        "url_ends": np.arange(shards + 1),
        "urls": np.full(shards, ord("a"), "u1"),
        "digest_ends": np.zeros(shards + 1, "<i8"),
        "digests": np.zeros(0, "u1"),
    }
    lengths = {name: (array.dtype.str, len(array)) for name, array in arrays.items()}
    lengths |= dict.fromkeys(("offsets", "key_hashes"), ("<u4", samples)) | {"labels": ("<i4", samples)}
    header = {"version": 1, "samples": samples, "shards": shards, "num_classes": classes, "multilabel": False}
    start, size = place_arrays(header | {"longest": 1, "classes": None, "hash": "0" * 64}, lengths)
    places = json.loads(start[16 : 16 + int.from_bytes(start[8:16], "little")])["arrays"]
    if damage:
        arrays["offsets"] = np.array([9], "<u4")
    with open(path / INDEX_NAME, "wb") as file:
        file.truncate(size)
        for at, data in [(0, start), *((len(start) + places[name][2], array) for name, array in arrays.items())]:
            file.seek(at)
            file.write(data)
    return Index.open(path)


def test_thirty_million_samples_are_counted_in_pieces(tmp_path, monkeypatch):
    index = sparse_index(tmp_path, 30_000_000, 3_000, 20_000)
    monkeypatch.setattr("pretrain.shards.survey._sampled_images", lambda index, ids: iter(()))
    tracemalloc.start()
    start = time.perf_counter()
    found = survey(index)
    ids = choose(index, 48)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.blocks.sum() == found.class_samples.sum() == 30_000_000
    assert (found.blocks[0], found.blocks[2048]) == (30_000_000 - 3_000, 3_000)
    assert len(ids) == 48
    assert seconds < 20  # 0.5 on one core
    assert peak < 64 << 20  # where its arrays are 360 MB


def test_offsets_that_fall_are_a_damaged_index(tmp_path):
    with pytest.raises(InputError, match=rf"{INDEX_NAME}: its offsets do not ascend: damaged; index the shards again"):
        survey(sparse_index(tmp_path, 100, 2, 1, damage=True))


def test_ids_are_drawn_one_from_each_of_equal_stretches():
    assert spread_ids(5, 9).tolist() == [0, 1, 2, 3, 4]
    ids = spread_ids(1000, 100)
    assert (ids // 10).tolist() == list(range(100))
    assert len(set((ids % 10).tolist())) > 5  # not every tenth


def test_a_name_takes_no_more_than_its_place_in_the_figures(lists):
    text = survey_text(survey(lists).figures())
    assert "5$ & 6$\\x1b]0;title\\x07\\u202e\\n\\udce9: " in text
    assert not set("\x1b\x07\u202e") & set(text)
