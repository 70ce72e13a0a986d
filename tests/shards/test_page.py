"""The page of a data set: its figures, its charts and its contact sheet."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from pretrain.console import printable
from pretrain.page.page import THUMBNAIL
from pretrain.shards.page import charts, choose, class_ends, constants, contact_sheet, dataset_page
from pretrain.shards.survey import survey
from tests.page.parsed import ParsedPage


def test_the_sheet_shows_every_class_about_as_often(shards):
    ids = choose(shards.index, 16)
    labels = shards.index.labels(ids)[:, 0].tolist()
    assert sorted(Counter(labels).values()) == [2, 2, 2, 2, 2, 3, 3]
    assert labels == sorted(labels)
    assert max(ids) > 100  # not the first of each class
    assert choose(shards.index, 16).tolist() == ids.tolist()
    assert sorted(choose(shards.index, 500).tolist()) == list(range(203))


def test_of_more_classes_than_pictures_the_sheet_shows_some_spread_evenly(write_shards):
    index = write_shards("classes", [90], labels=lambda number: number % 45).index
    labels = index.labels(choose(index, 12))[:, 0]
    assert len(set(labels.tolist())) == 12
    assert (labels[0], labels[-1]) == (0, 44)
    assert np.diff(labels).max() == 4


def test_samples_without_labels_are_on_the_sheet_too(write_shards):
    index = write_shards("unlabelled", [6], labels=lambda number: []).index
    pictures = contact_sheet(index)
    assert [(one.detail, one.caption) for one in pictures] == [(f"id {number}", "no label") for number in range(6)]


def test_the_page_holds_what_the_index_holds(lists):
    found = survey(lists)
    html = dataset_page(found).html()
    page = ParsedPage(html)
    assert not re.search(r"https?:|url\(|@import|<script|<link", html)
    figures = dict(zip(*(re.findall(rf"<{tag}>(.*?)</{tag}>", html) for tag in ("dt", "dd")), strict=True))
    expected = {"samples": "60", "shards": "3", "classes": "4", "labels a sample": "1.50", "unreadable": "3 of 60"}
    assert figures | expected == figures
    assert figures["index hash"] == lists.hash[:12]
    assert lists.hash in html
    assert str(lists.files[0].path.parent) in page.text

    shown = list(page.images())
    assert all(attributes["alt"] for attributes, _ in shown)
    drawn = [attributes["alt"] for attributes, image in shown if image.width > THUMBNAIL]
    assert [text.split(":")[0] for text in drawn] == ["4 classes", "Labels per sample", "Image sizes", "3 shards"]
    pictures = contact_sheet(lists)
    unreadable = [attributes for _, attributes in page.tags if attributes.get("class") == "unreadable"]
    assert sum(image.width <= THUMBNAIL for _, image in shown) + len(unreadable) == len(pictures) == 48
    assert len(unreadable) == sum(picture.image is None for picture in pictures) > 0
    assert all("not JPEG, PNG or WebP" in attributes["title"] for attributes in unreadable)
    # As text: what looks like markup in a name is escaped, what would control a terminal too.
    captions = [picture.caption for picture in pictures]
    assert any(lists.classes[0] in caption for caption in captions)
    assert set(map(printable, captions)) <= set(page.text)
    assert not set("\x1b\x07\u202e") & set("".join(page.text))
    assert any(
        text.startswith(f"Unreadable 3 of 60; the first is id {found.unreadable[0].sample_id}") for text in page.text
    )


def test_what_is_the_same_everywhere_is_said_and_not_drawn(write_shards, encoded):
    same = dict.fromkeys(range(6), encoded(np.zeros((12, 20), np.uint8)))
    found = survey(write_shards("same", [6], labels=lambda number: 0, suffixes=("png",), replace=same).index)
    assert charts(found) == []
    assert constants(found) == [
        "6 images looked at: PNG L 6.",
        "Every image looked at is 20 × 12.",
        f"Every sample takes {found.figures()['sample_bytes']['max'] / 1000:.3g} kB of its shard.",
    ]


def test_many_classes_are_a_curve_with_its_ends_as_tables(shards):
    counts = np.array([0, 0, *range(1, 200)])
    found = replace(survey(shards.index, images=5), class_samples=counts)
    curve, (most, fewest) = charts(found)[0], class_ends(found)
    assert curve.text == "201 classes, 2 of them empty: 1 … 199 samples, median 100"
    figure = Figure()
    curve.draw(figure)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_ydata().tolist() == sorted(counts[2:].tolist(), reverse=True)
    assert "the first 59 (dotted) hold half" in axes.get_xlabel()  # 199 + … + 141 = 10,030 of 19,900
    assert most.rows[:2] == [("200", "199"), ("199", "198")]
    assert fewest.rows[:2] == [("2", "1"), ("3", "2")]
    assert (most.caption, fewest.caption) == ("Most samples", "Fewest samples")


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
