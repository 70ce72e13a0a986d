"""report.json and report.md."""

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from fewshot.closeup import Closeup
from fewshot.config import ProtocolSection
from fewshot.given import read_given
from fewshot.report.charts import draw_charts
from fewshot.report.labels import side_labels
from fewshot.report.report import build_report, compared_features, describe_rows, write_report
from fewshot.report.text import markdown, table
from fewshot.score import Result, Scores, Sweep
from fewshot.task import draw_support
from pretrain.record.reportfolder import set_aside

DRAWS = draw_support(np.arange(60) % 3, classes=3, shots=(1, 5), seeds=(0, 1, 2))
ACCURACY = {"tanh": 0.6, "pixels": 0.4, "untrained": 0.3}


@pytest.fixture
def report():
    """report(**protocol): tanh, pixels and untrained of one checkpoint, seed s ahead by s points."""

    def make(id="w", name="small", **changes):
        protocol = ProtocolSection(**{"shots": (1, 5), "seeds": (0, 1, 2), "probes": ("ridge", "knn10"), **changes})
        rows = [
            Result(
                id,
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
        curves = [Sweep(id, "tanh", 5, seed, (1.0, 2.0), (0.1, 0.2 + seed / 10)) for seed in protocol.seeds]
        weights = {
            "id": id,
            "run": id,
            "averaged": False,
            "path": "runs/w",
            "checkpoint": "runs/w/checkpoints/step_00000007",
            "sha256": "ab" * 32,
            "step": 7,
            "headline": "tanh",
            "preprocessing": "squash to 256x256",
            "widths": {"tanh": 48},
            "dtype": "float32",
            "baselines": {"pixels": id, "untrained": id},
        }
        return build_report(
            name,
            protocol,
            Scores(rows, curves, {"probes": 1.25}),
            query_labels=np.zeros(30, np.int64),
            draws=DRAWS,
            weights=[weights],
            images={"support": {"images": 60, "classes": 3}, "query": {"images": 30, "commonest_class": 0.4}},
            arithmetic="features in float32; probes in float64",
            run={"ranks": 2},
        )

    return make


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """Its charts take seconds, and it has tests of its own."""
    monkeypatch.setattr("fewshot.report.report.html", lambda report, closeup: "")


@pytest.fixture
def closeup():
    """Of 30 query images, without images."""
    row = Result("w", "ridge", "tanh", 5, 0, 1024.0, 2 / 3)
    labels = np.arange(30) % 3
    return Closeup(row, DRAWS[1], np.arange(30), labels, np.where(labels == 2, 0, labels), [], [])


def test_the_rows_are_the_contracts(report):
    found = report()
    for row in found["results"]:
        assert set(row) - {"converged"} == {"weights", "probe", "features", "shots", "seed", "l2", "accuracy"}
    for row in found["summary"]:
        known = {"weights", "probe", "features", "shots", "mean", "std"}
        assert set(row) - {"query_std_error", "converged"} == known
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


def test_the_file_is_json_without_nan(report, closeup, tmp_path):
    write_report(report(), closeup, tmp_path)
    text = (tmp_path / "report" / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["name"] == "small"
    broken = report()
    broken["results"][0]["accuracy"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(broken, closeup, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_what_the_deviation_is_stands_beside_every_table_with_chance_and_the_query_sets_own_noise(report):
    found = report()
    row = next(r for r in found["summary"] if (r["probe"], r["features"], r["shots"]) == ("ridge", "tanh", 5))
    assert row["query_std_error"] == pytest.approx((0.66 * 0.34 / 30) ** 0.5)
    assert found["protocol"]["chance"] == pytest.approx(1 / 3)
    # Means of 32 to 66 %: of 30 images the error is largest at 46 %, the nearest to a half.
    low, high = (100 * (p * (1 - p) / 30) ** 0.5 for p in (0.32, 0.46))
    reading = (
        "±: standard deviation (ddof 1) over the draws of support images of seeds 0 1 2, all scored on the same 30",
        f"binomial standard error sqrt(p(1-p)/30), here {low:.2f} to {high:.2f} points",
        "chance: 33.33; the commonest class is 40.00 % of the query images",
    )
    page = markdown(found)
    for line in reading:
        assert table(found).count(line) == 1
        assert page.count(line) == 2  # of the leading probe and of the others


def test_a_probe_that_has_not_converged_is_marked_and_told(report):
    found = report(probes=("ridge", "logistic"))
    assert "†" not in markdown(found) + table(found)
    for row in found["results"]:
        row["converged"] = (row["probe"], row["features"], row["shots"], row["seed"]) != ("logistic", "tanh", 5, 1)
    for row in found["summary"]:
        row["converged"] = (row["probe"], row["features"], row["shots"]) != ("logistic", "tanh", 5)
    page = markdown(found)
    assert "| w | tanh | logistic | 62.00 ± 1.00 (8.86) | 66.00 ± 1.00† (8.65) |" in page
    assert "| w | tanh | logistic | 5 | 65.00 | 66.00† | 67.00 | 1.00 | 8.65 |" in page
    told = "logistic: 1 of 18 fits ended before their optimum"
    assert told in page
    assert told in table(found)


def test_images_without_a_label_are_told(report):
    found = report()
    found["protocol"]["images"]["query"]["unlabelled"] = 25
    for text in (markdown(found), table(found)):
        assert "25 images of the query set have no label and are not scored." in text


def test_a_single_seed_has_null_for_its_deviation(report):
    found = report(seeds=(1,))
    assert {row["std"] for row in found["summary"]} == {None}
    assert "±" not in table(found)
    assert "one draw of support images, of seed 1: how much another would differ is not known" in table(found)


def test_the_page_leads_with_the_five_shot_ridge(report):
    page = markdown(report())
    assert "**w: 66.00 ± 1.00 % at 5 shots** (ridge, features `tanh`)" in page
    assert "| w | tanh | 62.00 ± 1.00 (8.86) | 66.00 ± 1.00 (8.65) |" in page


def test_the_newest_weights_of_the_first_run_are_compared_with_the_others_and_with_what_stands_beside_them():
    def weights(id, run, step, headline, widths, **baselines):
        return {"id": id, "run": run, "step": step, "headline": headline, "widths": widths, "baselines": baselines}

    widths = {"cls": 8, "pixels": 4, "mean": 8}
    early = weights("r step 5", "r", 5, "cls", widths, pixels="r step 5")
    late = weights("r step 9", "r", 9, "cls", widths, pixels="r step 5")
    other = weights("s", "s", 99, "tanh", {"tanh": 2, "pixels": 4}, pixels="r step 5")
    bare = weights("t", "t", None, None, {"pixels": 4}, pixels="r step 5")
    first, *others = dict.fromkeys(compared_features([bare, early, late, other]))
    assert first == ("r step 9", "cls")
    assert others == [("r step 5", "cls"), ("s", "tanh"), ("r step 9", "mean"), ("r step 5", "pixels")]
    assert compared_features([bare]) == []


def compared(b, shots, difference, low, high, draws, **other):
    """A row of `comparisons` against the ridge on w's tanh; b names what differs."""
    a = {"weights": "w", "features": "tanh", "probe": "ridge"}
    row = {"a": a, "b": a | b, "shots": shots, "difference": difference, "low": low, "high": high, "draws": draws}
    return {"converged": True} | row | other


def test_comparisons_stand_on_the_page_and_the_first_on_the_console(report):
    found = report()
    assert "Comparisons" not in markdown(found)
    found["comparisons"]["rows"] = [
        compared({"weights": "v"}, 5, 0.013, 0.004, 0.0221, (0.01, 0.02, 0.009)),
        compared({"weights": "v", "features": "cls"}, 5, -0.01, -0.02, 0.001, (-0.02, 0.0, 0.01)),
        compared({"probe": "logistic"}, 1, 0.0, 0.0, 0.0, (0.0, 0.0, 0.0), converged=False),
        *(compared({"features": f"block {at}"}, 5, 0.1, 0.0, 0.2, (0.1, 0.1, 0.1)) for at in range(7)),
    ]
    page, console = markdown(found), table(found).splitlines()
    assert "| w - v | 5-shot | +1.30 | +0.40 … +2.21 | 3 of 3 | +1.00 | +2.00 | +0.90 |" in page
    assert "| w tanh - v cls | 5-shot | -1.00 | -2.00 … +0.10 | 1 of 3 | -2.00 | +0.00 | +1.00 |" in page
    assert "| ridge - logistic | 1-shot | +0.00† | +0.00 … +0.00 | 0 of 3 |" in page
    assert "It does not cover the choice of support sets" in page
    first = next(line for line in console if " of 3" in line)
    assert re.sub(" +", " ", first) == "w - v 5-shot +1.30 +0.40 … +2.21 3 of 3"
    assert not [line for line in console if "logistic" in line]  # of other shots
    assert console[-2].startswith("tanh - block 3 ")
    assert console[-1] == "… 3 more in report.md"


def test_a_baseline_of_several_weights_stands_once_and_last(report):
    found = report()
    later = {**found["weights"][0], "id": "v", "baselines": {"pixels": "w", "untrained": "v"}}
    found["weights"].append(later)
    for part in ("results", "summary"):
        own = [{**row, "weights": "v"} for row in found[part] if row["features"] != "pixels"]
        found[part] += own
    rows = [line.split()[:2] for line in table(found).splitlines()[2:7]]
    assert rows == [["w", "tanh"], ["v", "tanh"], ["all", "weights"], ["w", "untrained"], ["v", "untrained"]]
    page = markdown(found)
    assert "| all weights | pixels | 42.00 ± 1.00 (9.01) |" in page
    a = {"weights": "v", "features": "tanh", "probe": "ridge"}
    for baseline, named in (("pixels", "tanh - pixels"), ("untrained", "v tanh - w untrained")):
        row = compared({}, 5, 0.1, 0.0, 0.2, (0.1, 0.1, 0.1))
        found["comparisons"]["rows"] = [row | {"a": a, "b": a | {"weights": "w", "features": baseline}}]
        assert f"| {named} | 5-shot |" in markdown(found)
    found["weights"].append({**later, "id": "u", "baselines": {}})
    assert "| w and 1 more | pixels | 42.00 ± 1.00 (9.01) |" in markdown(found)


def test_every_table_holds_both_errors_and_chance(report):
    found = report()
    assert re.search(r"^chance +33\.33 +33\.33$", table(found), re.MULTILINE)
    page = markdown(found)
    assert "| chance |  | 33.33 | 33.33 |" in page
    assert "| chance |  |  | 33.33 | 33.33 |" in page, "of the other probes"
    assert "| chance |  |  |  | 33.33 | 33.33 | 33.33 | – | – |" in page, "of every seed"
    assert "| w | tanh - chance | +28.67 ± 1.00 | +32.67 ± 1.00 |" in page
    assert "| w | tanh - pixels | +20.00 ± 0.00 | +20.00 ± 0.00 |" in page


@pytest.fixture
def trained(report):
    """The report of steps 0 to 190 of a run, raw and averaged, which share the baseline of their pixels."""
    found = report()
    first, names = found["weights"][0], []
    found["weights"] = []
    for step in range(0, 200, 10):
        for averaged in (False, True):
            names.append(f"w step {step}{' averaged' if averaged else ''}")
            one = {**first, "id": names[-1], "run": "w", "averaged": averaged, "step": step}
            found["weights"].append({**one, "baselines": {"pixels": names[0]}})
    for part in ("results", "summary"):
        shared = [{**row, "weights": names[0]} for row in found[part] if row["features"] == "pixels"]
        found[part] = shared + [
            {**row, "weights": name} for name in names for row in found[part] if row["features"] == "tanh"
        ]
    found["oracle"]["curves"] = [{**curve, "weights": name} for name in names for curve in found["oracle"]["curves"]]
    return found


def test_the_steps_of_a_run_are_a_chart_with_a_line_for_each_kind_and_shots(trained, monkeypatch):
    saved, save = {}, Figure.savefig

    def saving(self, *given, **more):
        saved[len(saved)] = self
        save(self, *given, **more)

    monkeypatch.setattr(Figure, "savefig", saving)
    names = list(draw_charts(trained))
    assert names == ["accuracy.png", "training.png", "oracle.png"]
    axes = saved[names.index("training.png")].axes[0]
    lines = [[*line.lines[0].get_xdata()] for line in axes.containers]
    assert lines == [list(range(0, 200, 10))] * 4
    legend = [text.get_text() for text in saved[1].legends[0].get_texts()]
    assert legend == [
        "w tanh 1-shot", "w tanh 5-shot", "w averaged tanh 1-shot", "w averaged tanh 5-shot",
        "all weights pixels 5-shot", "chance",
    ]  # fmt: skip
    assert [line.get_ydata()[0] for line in axes.lines[-2:]] == pytest.approx([46, 100 / 3])
    shown = [text.get_text() for text in saved[0].legends[0].get_texts()]
    assert shown == ["w step 190 tanh", "w step 190 averaged tanh", "all weights pixels", "chance"]


def test_many_steps_stay_readable(trained):
    page = markdown(trained)
    assert max(map(len, table(trained).splitlines()[1:])) <= 150
    assert max(line.count("|") for line in page.splitlines()) <= 12
    assert "| w step 0 | tanh | 5 | 10.00 | 30.00 | 30.00 | 2^1 |" in page


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
    assert re.split("  +", lines[1]) == ["weights", "features", "1-shot ± draws (query)", "5-shot ± draws (query)"]
    assert lines[2].split() == ["w", "tanh", "62.00", "±", "1.00", "(8.86)", "66.00", "±", "1.00", "(8.65)"]
    assert "w: runs/w/checkpoints/step_00000007" in lines


def test_scoring_what_was_learned_from_or_trained_on_is_said(report):
    found = report()
    found["protocol"]["images"]["query"] |= {"in_support": 5, "index_sha256": "cd", "sequence_sha256": "ab"}
    found["protocol"]["images"]["note"] = "a.vfi: without names"
    found["weights"][0]["trained_on"] = "cd"
    for text in (markdown(found), table(found)):
        assert "5 of 30 query images are among the support images that were drawn" in text
        assert "w was trained on the images of the query set." in text
        assert "a.vfi: without names." in text
    found["weights"][0]["trained_on"] = "ab"  # a run's, whose index recorded no content
    assert "w was trained on the images of the query set, by keys, labels and sizes." in markdown(found)
    found["weights"][0]["trained_on"] = "ef"
    assert "was trained on" not in markdown(found)


def test_rows_that_are_in_both_are_counted(tmp_path):
    x = np.random.default_rng(0).normal(size=(9, 4))
    np.savez(tmp_path / "f.npz", support_x=x[:6], support_y=[0, 1] * 3, query_x=x[4:], query_y=[0, 1, 0, 1, 0])
    given = read_given(tmp_path / "f.npz")
    draws = draw_support(given.support_labels, classes=2, shots=(1,), seeds=(0,))
    assert describe_rows(given, draws)["query"]["in_support"] == 2


def test_the_first_probe_that_is_named_leads(report):
    found = report(probes=("knn10", "ridge"))
    assert "knn10, mean" in table(found)
    assert "66.00 ± 1.00 % at 5 shots** (knn10" in markdown(found)


def test_charts_are_on_the_page(report, closeup, tmp_path):
    page = (write_report(report(), closeup, tmp_path) / "report.md").read_text()
    for name in ("accuracy.png", "oracle.png"):
        assert f"]({name})" in page
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


# Mathematics that does not parse, a name that matplotlib hides, markup, and what would control a terminal.
STRANGE = "_$\\frac{$|*b*`<i>`\x1b[31m\n\udcff"
SHOWN = "_$\\frac{$|*b*`<i>`\\x1b[31m\\n\\udcff"


def test_a_chart_shows_names_as_they_are(report, monkeypatch):
    saved, save = [], Figure.savefig

    def saving(self, *given, **more):
        saved.append(self)
        save(self, *given, **more)

    monkeypatch.setattr(Figure, "savefig", saving)
    found = report(STRANGE, STRANGE)
    found["weights"] *= 2  # with one, the legend names the features alone
    assert list(draw_charts(found)) == ["accuracy.png", "oracle.png"]
    for drawn in saved:
        assert SHOWN in drawn.axes[0].get_title(loc="left")
        assert f"{SHOWN} tanh" in drawn.legends[0].get_texts()[0].get_text()


def test_a_page_and_a_table_show_names_as_they_are(report, closeup, tmp_path):
    found = report(STRANGE, STRANGE)
    assert f"{SHOWN}  tanh" in table(found)
    page = (write_report(found, closeup, tmp_path) / "report.md").read_text()
    literal = r"\_\$\\frac{\$\|\*b\*\`\<i\>\`\\x1b\[31m\\n\\udcff"
    assert page.startswith(f"# Few-shot: {literal}\n")
    assert f"- **{literal}: 66.00" in page
    assert f"| {literal} | tanh | 62.00" in page
    assert json.loads((tmp_path / "report" / "report.json").read_text())["name"] == STRANGE


def test_words_with_underscores_stay_readable(report):
    assert "| runs/a_b step_7 |" in markdown(report("runs/a_b step_7")).replace(" | tanh", " |")


def test_another_report_is_kept_and_the_same_one_written_again(report, closeup, tmp_path):
    def make(id):
        kept = set_aside(report(id), tmp_path / "report")
        write_report(report(id) | {"run": {"seconds": {"probes": 9.0}}}, closeup, tmp_path)
        return kept and kept.name

    assert [make("a"), make("a"), make("b"), make("b"), make("a")] == [None, None, "report-1", None, "report-2"]
    held = {path.parent.name: json.loads(path.read_text())["weights"][0]["id"] for path in tmp_path.rglob("*.json")}
    assert held == {"report": "a", "report-1": "a", "report-2": "b"}


@pytest.mark.parametrize("there", ["{", "[]", None], ids=["no JSON", "a list", "nothing"])
def test_what_is_no_report_is_kept_too(report, tmp_path, there):
    (tmp_path / "report").mkdir()
    if there:
        (tmp_path / "report" / "report.json").write_text(there)
    assert set_aside(report(), tmp_path / "report") == tmp_path / "report-1"


def test_a_baseline_that_stands_under_other_weights_is_named_as_the_references_own(report):
    found = report()
    found["weights"] += [{**found["weights"][0], "id": "v", "baselines": {"pixels": "w", "untrained": "v"}}]
    a = {"weights": "v", "features": "tanh", "probe": "ridge"}

    def sides(**b):
        return side_labels(found, {"a": a, "b": a | b})

    assert sides(weights="w", features="pixels") == ("tanh", "pixels")
    assert sides(features="untrained") == ("tanh", "untrained")
    assert sides(weights="w", features="untrained") == ("v tanh", "w untrained"), "that of another network"
    assert sides(weights="w") == ("v", "w")
