"""What is told of a data set: its figures, its contact sheet, and the page and picture that show both."""

import base64
import io
import json
import re
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pretrain.console import printable
from pretrain.datasets.dataset import Dataset, png
from pretrain.errors import InputError
from pretrain.index import indexfile
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME, place_arrays
from pretrain.shards.charts import charts, constants
from pretrain.shards.portrait import Portrait, check_target, page, picture, portray, write_page, write_picture
from pretrain.shards.sheet import SIDE, choose
from pretrain.shards.survey import locate, spread_ids, survey, survey_text
from pretrain.shards.write import ShardLayout, write_shards

NAMES = (
    "tern <b>",
    "5$ & 6$\x1b]0;title\x07\u202e\n\udce9",
    'a "quoted" name that is far too long to be a label',
    "고양이",
)


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """60 grey squares with 0 … 3 labels each; id 7 and two others hold no image."""
    rng = np.random.default_rng(0)
    counts = np.arange(60) % 4
    starts = np.concatenate([[0], np.cumsum(counts)])
    labels = np.concatenate([rng.permutation(4)[:count] for count in counts]).astype(np.int32)

    def read(row):
        return "png", b"no image" if row % 20 == 13 else png(np.full((8 + row % 3, 300), row, np.uint8))

    folder = tmp_path_factory.mktemp("lists") / "set"
    write_shards(Dataset("set", "all", labels, starts, NAMES, "f", read), folder, ShardLayout(samples=25))
    return Index.open(folder)


class Page(HTMLParser):
    """Attributes by tag, all text, and whether every tag is closed in turn."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def images(self):
        """(attributes, decoded image) of every img."""
        for tag, attributes in self.tags:
            if tag == "img":
                _, data = attributes["src"].split(";base64,")
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                yield attributes, image


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
    assert [look.sample_id for look in found.unreadable] == bad
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
    assert [look.sample_id for look in survey(made.index).unreadable] == [4]


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
    monkeypatch.setattr("pretrain.shards.survey._look", lambda index, ids: iter(()))
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


def test_the_sheet_shows_every_class_about_as_often(shards):
    ids = choose(shards.index, 16)
    labels = shards.index.labels(ids)[:, 0].tolist()
    assert sorted(Counter(labels).values()) == [2, 2, 2, 2, 2, 3, 3]
    assert labels == sorted(labels)
    assert max(ids) > 100  # not the first of each class
    assert choose(shards.index, 16).tolist() == ids.tolist()
    assert sorted(choose(shards.index, 500).tolist()) == list(range(203))


def test_of_more_classes_than_tiles_the_sheet_shows_some_spread_evenly(write_shards):
    index = write_shards("classes", [90], labels=lambda number: number % 45).index
    labels = index.labels(choose(index, 12))[:, 0]
    assert len(set(labels.tolist())) == 12
    assert (labels[0], labels[-1]) == (0, 44)
    assert np.diff(labels).max() == 4


def test_samples_without_labels_are_on_the_sheet_too(write_shards):
    index = write_shards("unlabelled", [6], labels=lambda number: []).index
    tiles = portray(survey(index)).tiles
    assert [(tile.sample_id, tile.caption) for tile in tiles] == [(number, "no label") for number in range(6)]


def test_the_page_holds_what_the_index_holds(lists):
    portrait = portray(survey(lists))
    html = page(portrait)
    assert html == page(portray(survey(lists)))
    found = Page(html)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe"})
    assert not re.search(r"https?:|url\(|@import", html)
    figures = dict(zip(*(re.findall(rf"<{tag}>(.*?)</{tag}>", html) for tag in ("dt", "dd")), strict=True))
    expected = {"samples": "60", "shards": "3", "classes": "4", "labels a sample": "1.50", "unreadable": "3 of 60"}
    assert figures | expected == figures
    assert figures["index hash"] == lists.hash[:12]
    assert lists.hash in html
    assert str(lists.files[0].path.parent) in found.text

    shown = list(found.images())
    assert all(attributes["alt"] for attributes, _ in shown)
    drawn = [attributes["alt"] for attributes, image in shown if image.width > SIDE]
    assert [text.split(":")[0] for text in drawn] == ["4 classes", "Labels per sample", "Image sizes", "3 shards"]
    tiles = [image for _, image in shown if image.width <= SIDE]
    unreadable = [tag for tag in found.tags if tag[1].get("class") == "unreadable"]
    assert len(tiles) + len(unreadable) == 48
    assert len(unreadable) == sum(tile.image is None for tile in portrait.tiles) > 0
    assert all("not JPEG, PNG or WebP" in attributes["title"] for _, attributes in unreadable)
    captions = [tile.caption for tile in portrait.tiles]
    assert any(NAMES[0] in caption for caption in captions)
    # As text: what looks like markup in a name is escaped, what would control a terminal too.
    assert set(map(printable, captions)) <= set(found.text)
    assert not set("\x1b\x07\u202e") & set("".join(found.text))
    assert any(
        text.startswith(f"Unreadable 3 of 60; the first is id {portrait.survey.unreadable[0].sample_id}")
        for text in found.text
    )


def test_a_name_takes_no_more_than_its_place_in_the_figures(lists):
    text = survey_text(survey(lists).figures())
    assert "5$ & 6$\\x1b]0;title\\x07\\u202e\\n\\udce9: " in text
    assert not set("\x1b\x07\u202e") & set(text)


def test_the_picture_shows_the_same(lists, tmp_path):
    portrait = portray(survey(lists))
    write_picture(portrait, tmp_path / "set.png")
    write_page(portrait, tmp_path / "set.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.html", "set.png"]
    image = Image.open(tmp_path / "set.png")
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB"))
    dark = sum(tile.image is None for tile in portrait.tiles)
    grey = (pixels == 0xBB).all(axis=2).sum()
    assert 0.9 * dark < grey / SIDE**2 <= dark  # the word on each takes a little
    assert (pixels[:, -20:] == 255).all()  # nothing runs into the margin


def test_what_is_the_same_everywhere_is_said_and_not_drawn(write_shards, encoded):
    same = dict.fromkeys(range(6), encoded(np.zeros((12, 20), np.uint8)))
    found = survey(write_shards("same", [6], labels=lambda number: 0, suffixes=("png",), replace=same).index)
    assert charts(found) == []
    assert constants(found) == [
        "6 images looked at: PNG L 6.",
        "Every image looked at is 20 × 12.",
        f"Every sample takes {found.figures()['sample_bytes']['max'] / 1000:.3g} kB of its shard.",
    ]
    assert picture(Portrait(found, ())).height > 0


def test_many_classes_are_a_curve_with_its_ends_as_tables(shards):
    counts = np.array([0, 0, *range(1, 200)])
    found = replace(survey(shards.index, images=5), class_samples=counts)
    curve, ends = charts(found)[:2]
    assert curve.text == "201 classes, 2 of them empty: 1 … 199 samples, median 100"
    figure = Figure()
    curve.draw(figure)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_ydata().tolist() == sorted(counts[2:].tolist(), reverse=True)
    assert "the first 59 (dotted) hold half" in axes.get_xlabel()  # 199 + … + 141 = 10,030 of 19,900
    assert ends.tables["most samples"][:2] == [("200", 199), ("199", 198)]
    assert ends.tables["fewest samples"][:2] == [("2", 1), ("3", 2)]
    text = Page(page(Portrait(found, ()))).text
    assert text[text.index("fewest samples") + 1 :][:4] == ["2", "1", "3", "2"]


def test_a_long_tail_of_sample_sizes_is_told_and_the_rest_shown_whole(shards):
    blocks = np.zeros(50_001, np.int64)
    blocks[100:200] = 10
    blocks[50_000] = 2
    found = replace(survey(shards.index, images=1), blocks=blocks)
    figure = Figure()
    next(chart for chart in charts(found) if chart.text.startswith("Bytes")).draw(figure)
    axes = figure.axes[0]
    values, edges, _ = axes.patches[0].get_data()
    assert values.sum() == blocks[:200].sum()
    assert edges[0] == pytest.approx(99.5 * 0.512)
    assert axes.texts[0].get_text() == "0.2 % above 102 kB, the largest 25.6 MB"


def test_a_file_that_cannot_be_written_is_refused(lists, tmp_path):
    for path, what in [
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x.html", "there is no folder"),
        (Path("s3://bucket/x.html"), "there is no folder s3:/bucket"),
    ]:
        with pytest.raises(InputError, match=what):
            check_target(path)
    with pytest.raises(InputError, match=r"x\.html: No such file"):
        write_page(Portrait(survey(lists, 1), ()), tmp_path / "no" / "x.html")
    assert list(tmp_path.iterdir()) == []
