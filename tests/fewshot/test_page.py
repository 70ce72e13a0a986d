"""report.html: the whole report as one page."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot.cache import NetworkFeatures, write_features
from fewshot.closeup import QUERIES, WORST, Closeup, Mistake, Near, look_at_given, look_at_networks, reference
from fewshot.config import ProtocolSection
from fewshot.features import LAYERS, Extraction, extract
from fewshot.given import read_given
from fewshot.probes.support import Support
from fewshot.probes.table import PROBES
from fewshot.report import pictures
from fewshot.report.page import html
from fewshot.report.report import build_report, describe_task, report_given, write_report
from fewshot.score import Result, Scores, Sweep, score_given, score_networks
from fewshot.task import Draw, open_task
from pretrain.console import END, ISOLATE, printable
from pretrain.page.page import Picture
from tests.page.parsed import ParsedPage

PROTOCOL = ProtocolSection(shots=(1, 5), seeds=(0, 1), probes=("ridge", "knn10"))
HOSTILE = [
    '<script>alert("x")</script>',
    '"><img src=x onerror=alert(1)>',
    "$\\frac{$ _a_",
    "\x1b]0;title\x07\x1b[31m",
    "\u202egnp.exe",
    "שלום",
    "{{ 7 * 7 }}{% raw %}",
    "</title></style>&lt;b&gt;",
    "a\nb\udcff",
    "long " * 60,
]


@pytest.fixture(scope="module")
def scored(digits, shards, tiny, alone, tmp_path_factory):
    """scored(class names, weights' id) -> (report, closeup, feature file, task) of digits; pixels are the features."""
    support_x, support_y, query_x, query_y = digits
    pixels = [(x.reshape(-1, 8, 8) * 15).astype(np.uint8) for x in (support_x[:240], query_x[:150])]

    def score(names, id):
        places = [
            shards(split, images, labels, names)
            for split, images, labels in (("s", pixels[0], support_y[:240]), ("q", pixels[1], query_y[:150]))
        ]
        task = open_task(*places, PROTOCOL)
        arrays = {"support_ids": task.support_ids}
        for split, (index, ids) in task.splits.items():
            how = Extraction(tiny(), 50, 1, alone)
            found = extract(None, [LAYERS["pixels"]], index, ids, how)["pixels"]
            arrays |= {f"{split}_cls": found, f"{split}_pixels": found}
        file = tmp_path_factory.mktemp("features") / "f.npz"
        write_features(file, {"support_ids": task.support_ids, **arrays})
        network = SimpleNamespace(id=id, run=id, path=id, source=SimpleNamespace(path=id, step=7))
        one = NetworkFeatures(network, "ab" * 32, {"cls": file, "pixels": file}, {"cls": 64, "pixels": 64})
        cpu = torch.device("cpu")
        scores = score_networks([one], task, PROTOCOL, cpu)
        weights = {
            "id": id,
            "run": id,
            "averaged": False,
            "path": id,
            "checkpoint": id,
            "sha256": "ab" * 32,
            "step": 7,
            "headline": "cls",
        }
        weights |= {
            "headline": "cls",
            "preprocessing": "none",
            "widths": {"cls": 64},
            "dtype": "float32",
            "baselines": {"pixels": id},
        }
        report = build_report(
            id,
            PROTOCOL,
            scores,
            query_labels=task.query_labels,
            draws=task.draws,
            weights=[weights],
            images=describe_task(task, 0),
            arithmetic="float64",
            run={"command": f"python launch/fewshot.py --init {id}"},
        )
        return report, look_at_networks([one], task, PROTOCOL, scores, cpu), file, task

    return score


@pytest.fixture(scope="module")
def plain(scored):
    return scored([f"digit {number}" for number in range(10)], "w")


@pytest.fixture(scope="module")
def page(plain):
    return html(*plain[:2])


def anatomy(page):
    """The elements of a page, each with the names of its attributes."""
    return [(tag, sorted(attributes)) for tag, attributes in ParsedPage(page).tags]


def test_names_that_try_to_be_markup_mathematics_or_control_are_text_everywhere(scored, page, tmp_path):
    report, closeup, *_ = scored(HOSTILE, HOSTILE[0])
    hostile = (write_report(report, closeup, tmp_path) / "report.html").read_text()
    assert anatomy(hostile) == anatomy(page)  # no element and no attribute is born of a name
    text = "".join(ParsedPage(hostile).text).replace(ISOLATE, "").replace(END, "")
    for name in HOSTILE:
        assert printable(name) in text
    assert not set("\x1b\x07\u202e\udcff") & set(hostile)
    assert "javascript:" not in hostile
    assert not re.search(r"https?:|url\(|@import", hostile)


def test_every_part_is_on_the_page(plain, page):
    _, closeup, _, task = plain
    page = ParsedPage(page)
    for head in ("Accuracy", "Comparisons", "Nearest neighbours", "Worst mistakes", "Every draw", "To get this again"):
        assert head in page.text
    assert f"{len(task.query_ids):,}" in page.text
    assert "baseline pixels" in page.text
    for needed in (closeup.draw.sha256, "ab" * 32, task.support.hash, "python launch/fewshot.py --init w"):
        assert any(needed in text for text in page.text)
    alts = [attributes["alt"] for attributes, _ in page.images()]
    assert all(alts)
    assert any(alt.startswith("Oracle, not a result") for alt in alts)
    shown = [image for attributes, image in page.images() if image.size == (8, 8)]
    assert len(shown) == 10 * 5 + QUERIES * 6 + 2 * len(closeup.mistakes) <= 200


def test_the_closeup_is_of_the_row_that_is_reported(plain):
    closeup = plain[1]
    row = closeup.row
    assert (row.weights, row.features, row.probe, row.shots, row.seed) == ("w", "cls", "ridge", 5, 0)
    assert row.accuracy == np.mean(closeup.predicted == closeup.labels)
    assert closeup.confusions.counts.sum() == len(closeup.labels)


def test_the_closeup_is_of_the_newest_weights_of_the_first_run():
    def features(run, step, *names):
        return SimpleNamespace(
            network=SimpleNamespace(run=run, source=SimpleNamespace(step=step)), files=dict.fromkeys(names)
        )

    baselines, early, late, other = (
        features("a", 9, "pixels"),
        features("a", 1, "cls"),
        features("a", 2, "cls"),
        features("b", 5, "cls"),
    )
    assert reference([baselines, early, late, other]) is late
    assert reference([baselines]) is baselines


def test_neighbours_are_the_nearest_by_cosine(plain):
    _, closeup, file, task = plain
    with np.load(file) as arrays:
        support = arrays["support_cls"][np.searchsorted(task.support_ids, closeup.draw.ids)].astype(np.float64)
        query = arrays["query_cls"].astype(np.float64)
    support, query = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (support, query))
    assert len({int(closeup.labels[near.row]) for near in closeup.neighbours}) == QUERIES
    for near in closeup.neighbours:
        cosines = support @ query[near.row]
        assert near.cosines == pytest.approx(np.sort(cosines)[::-1][: len(near.cosines)])
        assert cosines[list(near.places)] == pytest.approx(near.cosines)


def test_the_worst_mistakes_are_those_of_the_largest_margin(plain):
    _, closeup, file, task = plain
    with np.load(file) as arrays:
        x, query = arrays["support_cls"], torch.from_numpy(arrays["query_cls"])
    rows = torch.from_numpy(x[np.searchsorted(task.support_ids, closeup.draw.ids)]).double()
    support = Support(rows, torch.from_numpy(closeup.draw.labels), 10)
    scores = PROBES["ridge"].fit(support, 1024.0).scores(query.double()).numpy()
    margins = scores.max(axis=1) - scores[np.arange(len(scores)), closeup.labels]
    worst = np.sort(margins)[::-1][:WORST]
    assert [one.margin for one in closeup.mistakes] == pytest.approx(worst[worst > 0])
    for one in closeup.mistakes:
        assert (
            closeup.draw.labels[one.near.places[0]] == closeup.predicted[one.near.row] != closeup.labels[one.near.row]
        )


def test_features_from_a_file_have_no_images_and_all_the_rest(digits, tmp_path):
    x, y, query, query_y = digits
    np.savez(tmp_path / "f.npz", support_x=x[:200], support_y=y[:200], query_x=query[:50], query_y=query_y[:50])
    given = read_given(tmp_path / "f.npz")
    protocol = ProtocolSection(shots=(1,), seeds=(0,), probes=("ridge",), oracle=False)
    scores, draws = score_given(given, protocol, "f")
    page = ParsedPage(
        html(report_given(given, "f", protocol, draws, scores, {}), look_at_given(given, draws, protocol, scores))
    )
    assert any("there are no images to show" in text for text in page.text)
    assert {"cosine", "taken for", "precision"} <= set(page.text)


def test_where_the_shards_are_gone_the_page_says_so(plain, tmp_path):
    closeup = plain[1]
    shard = Path(next(iter(closeup.indices[1].shards.urls())))
    shutil.move(shard, tmp_path / "kept")
    try:
        said = pictures.fault(closeup)
    finally:
        shutil.move(tmp_path / "kept", shard)
    assert said.startswith("the images cannot be shown: ")
    assert shard.name in said
    assert pictures.fault(closeup) == ""


def test_a_page_of_imagenets_shape_stays_small(plain, monkeypatch):
    """1,000 classes, 50,000 queries, 12 draws, two networks and long names; pictures as detailed as photographs."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (80, 80, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((160, 160), Image.Resampling.BICUBIC)
    taken = []
    monkeypatch.setattr(
        pictures, "sample_picture", lambda index, id, *words: taken.append(id) or Picture(*words, photo)
    )
    labels = np.arange(50_000) % 1000
    predicted = np.where(generator.random(50_000) < 0.7, labels, generator.integers(0, 1000, 50_000))
    draw = Draw(5, 0, np.arange(5000))
    row = Result("a", "ridge", "tanh", 5, 0, 1024.0, float(np.mean(predicted == labels)))
    near = [Near(number, tuple(range(5)), (0.5,) * 5) for number in range(QUERIES)]
    wrong = np.flatnonzero(predicted != labels)[:WORST]
    mistakes = [Mistake(0.5, Near(int(row), (0,), (0.5,))) for row in wrong]
    closeup = Closeup(row, draw, np.arange(50_000), labels, predicted, near, mistakes, plain[1].indices)
    shots, seeds, probes = (1, 5, 10, 25), (0, 1, 2), tuple(PROBES)
    results = [
        Result(id, probe, feature, k, seed, None, 0.5)
        for id in "ab" for feature in ("tanh", "cls") for probe in probes for k in shots for seed in seeds
    ]  # fmt: skip
    sweeps = [Sweep(id, "tanh", k, s, (1.0, 2.0), (0.5, 0.6)) for id in "ab" for k in shots for s in seeds]
    report = plain[0] | {"name": "imagenet"}
    weights = [plain[0]["weights"][0] | {"id": id, "headline": "tanh", "baselines": {}} for id in "ab"]
    report = build_report(
        "imagenet",
        ProtocolSection(shots=shots, seeds=seeds, probes=probes),
        Scores(results, sweeps, {}),
        query_labels=labels,
        draws=[draw],
        weights=weights,
        images=describe_task(plain[3], 0),
        arithmetic="float64",
        run={},
    )
    page = html(report, closeup)
    assert len(taken) <= 200
    assert len(page) < 5_000_000
    assert "The 20 classes of lowest accuracy" in page
