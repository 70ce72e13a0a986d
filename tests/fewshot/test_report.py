"""report.json and report.md."""

import json
import re

import numpy as np
import pytest

from fewshot import chart
from fewshot.config import ProtocolSection
from fewshot.draw import draw_support
from fewshot.report import build_report, markdown, table, write_report
from fewshot.score import Result, Scores, Sweep

DRAWS = draw_support(np.arange(60) % 3, classes=3, shots=(1, 5), seeds=(0, 1, 2))
ACCURACY = {"tanh": 0.6, "pixels": 0.4, "untrained": 0.3}


@pytest.fixture
def report():
    """report(**protocol): tanh, pixels and untrained of one checkpoint, seed s ahead by s points."""

    def make(**changes):
        protocol = ProtocolSection(**{"shots": (1, 5), "seeds": (0, 1, 2), "probes": ("ridge", "knn10"), **changes})
        rows = [
            Result(
                "w",
                probe,
                feature,
                shots,
                seed,
                1024.0 if probe == "ridge" else None,
                base + shots / 100 + seed / 100,
            )
            for feature, base in ACCURACY.items()
            for probe in protocol.probes
            for shots in protocol.shots
            for seed in protocol.seeds
        ]
        curves = [Sweep("w", "tanh", 5, seed, (1.0, 2.0), (0.1, 0.2 + seed / 10)) for seed in protocol.seeds]
        weights = {
            "id": "w",
            "path": "runs/w",
            "sha256": "ab" * 32,
            "step": 7,
            "headline": "tanh",
            "preprocessing": "squash to 256x256",
            "widths": {"tanh": 48},
            "dtype": "float32",
        }
        return build_report(
            "small",
            protocol,
            Scores(rows, curves, {"probes": 1.25}),
            draws=DRAWS,
            weights=[weights],
            images={"support": {"images": 60}, "query": {"images": 30}},
            run={"ranks": 2},
        )

    return make


def test_the_rows_are_the_contracts(report):
    found = report()
    for row in found["results"]:
        assert set(row) == {"weights", "probe", "features", "shots", "seed", "l2", "accuracy"}
    for row in found["summary"]:
        assert set(row) == {"weights", "probe", "features", "shots", "mean", "std"}
    for one in found["weights"]:
        assert {"id", "path", "sha256", "step"} <= set(one)
    assert (len(found["results"]), len(found["summary"])) == (36, 12)
    assert {row["l2"] for row in found["results"] if row["probe"] == "knn10"} == {None}


def test_the_summary_is_mean_and_ddof_1_deviation(report):
    row = next(r for r in report()["summary"] if (r["probe"], r["features"], r["shots"]) == ("ridge", "tanh", 5))
    assert row["mean"] == pytest.approx(0.66)
    assert row["std"] == pytest.approx(np.std([0.65, 0.66, 0.67], ddof=1))


def test_the_protocol_holds_what_the_draw_was(report):
    protocol = report()["protocol"]
    assert protocol["preprocessing"] == "squash to 256x256"
    assert protocol["seeds"] == [0, 1, 2]
    hashes = {(row["shots"], row["seed"]): row["sha256"] for row in protocol["support_ids"]}
    assert hashes == {(draw.shots, draw.seed): draw.sha256 for draw in DRAWS}


def test_the_sweep_stands_apart_and_is_called_an_oracle(report):
    found = report()
    assert {row["l2"] for row in found["results"]} == {1024.0, None}
    assert "oracle on the query set" in found["oracle"]["note"]
    assert found["oracle"]["curves"][0]["l2"] == (1.0, 2.0)


def test_the_file_is_json_without_nan(report, tmp_path):
    write_report(report(), tmp_path)
    text = (tmp_path / "report" / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["name"] == "small"
    broken = report()
    broken["results"][0]["accuracy"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(broken, tmp_path / "broken")
    assert not any((tmp_path / "broken" / "report").iterdir())


def test_a_single_seed_has_null_for_its_deviation(report):
    found = report(seeds=(1,))
    assert {row["std"] for row in found["summary"]} == {None}
    assert "±" not in table(found)


def test_the_page_leads_with_the_five_shot_ridge(report):
    page = markdown(report())
    assert "**w: 66.00 ± 1.00 % at 5 shots** (ridge, features `tanh`)" in page
    assert "| w | tanh | 62.00 ± 1.00 | 66.00 ± 1.00 |" in page


def test_the_page_tells_how_far_the_baselines_are(report):
    page = markdown(report())
    assert "| w | tanh - pixels | +20.00 | +20.00 |" in page
    assert "| w | tanh - untrained | +30.00 | +30.00 |" in page


def test_the_page_holds_every_seed_and_all_that_is_needed_again(report):
    page = markdown(report())
    assert "| w | tanh | ridge | 5 | 65.00 | 66.00 | 67.00 |" in page
    assert "| w | pixels | knn10 | 1 | 41.00 | 42.00 | 43.00 |" in page
    for needed in (
        "λ = 1024",
        "tanh: 48",
        "squash to 256x256",
        "runs/w",
        "ab" * 32,
        "| 7 |",
        "1.2 s",
        DRAWS[0].sha256,
    ):
        assert needed in page


def test_the_sweep_on_the_page_is_a_mean_over_seeds_and_never_the_headline(report):
    page = markdown(report())
    assert page.index("Oracle on the query set") > page.index("Every seed")
    assert "| 2^1 | 30.00 |" in page


def test_every_table_is_rectangular(report):
    for block in re.findall(r"(?:^\|.*\n)+", markdown(report()), flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_console_table_is_the_headline(report):
    lines = table(report()).splitlines()
    assert lines[0] == "Accuracy in % on 30 query images: ridge, λ = 1024, mean ± std over seeds 0 1 2"
    assert lines[1].split() == ["weights", "features", "1-shot", "5-shot"]
    assert lines[2].split() == ["w", "tanh", "62.00", "±", "1.00", "66.00", "±", "1.00"]


def test_scoring_what_was_learned_from_is_said(report):
    found = report()
    assert "learned from" not in markdown(found) + table(found)
    found["protocol"]["images"]["support_is_query"] = True
    for text in (markdown(found), table(found)):
        assert "images that were learned from are among those scored" in text


def test_without_ridge_the_first_probe_leads(report):
    found = report(probes=("knn10",))
    assert "knn10, mean" in table(found)
    assert "66.00 ± 1.00 % at 5 shots** (knn10" in markdown(found)


def test_charts_are_on_the_page_when_they_were_drawn(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    page = write_report(report(), tmp_path).read_text()
    for name in ("accuracy.png", "oracle.png"):
        assert f"]({name})" in page
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("fewshot.report.draw_charts", lambda *_: [])
    assert ".png" not in write_report(report(), tmp_path / "plain").read_text()


def test_no_matplotlib_no_charts(report, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert chart.draw_charts(report(), tmp_path) == []
