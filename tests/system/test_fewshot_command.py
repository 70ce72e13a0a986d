"""launch/fewshot.py from the outside: statuses, messages, reports."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks.started import Forked
from fewshot.probes.table import PROBES
from pretrain.datasets.dataset import array_dataset
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.shards.write import ShardLayout, write_shards

COMMAND = "launch/fewshot.py"


def report_in(folder):
    return json.loads((folder / "report" / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return x[order].astype(np.float32), y[order]


@pytest.fixture(scope="module")
def digit_features(digits, tmp_path_factory):
    x, y = digits
    path = tmp_path_factory.mktemp("given") / "digits.npz"
    np.savez(path, support_x=x[:900], support_y=y[:900], query_x=x[900:], query_y=y[900:])
    return path


@pytest.fixture(scope="module")
def digit_config(digits, tmp_path_factory):
    """A config of 240 support and 150 query digits as shards."""
    x, y = digits
    folder = tmp_path_factory.mktemp("shards")
    for split, rows in (("support", slice(0, 240)), ("query", slice(240, 390))):
        pixels = (x[rows].reshape(-1, 8, 8) * 15).astype(np.uint8)
        write_shards(array_dataset("digits", split, pixels, y[rows], None), folder / split, ShardLayout(samples=100))
    config = {
        "name": "digits",
        "data": {"support": str(folder / "support"), "query": str(folder / "query"), "workers": 1},
        "fewshot": {"shots": [1, 5], "seeds": [0, 1], "batch": 16, "oracle": False},
    }
    path = folder / "digits.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, run_folder):
    """Two run folders, each with a checkpoint: with and without representation."""
    folder = tmp_path_factory.mktemp("runs")
    for name, size in (("first", 24), ("second", None)):
        spec = ViTSpec(
            patch_size=2, layers=1, width=16, mlp=32, heads=2, image_size=8, channels=1, num_classes=10,
            representation_size=size,
        )  # fmt: skip
        model = VisionTransformer(spec)
        initialize(model, 5)
        run_folder(folder / name, model)
    return folder


def test_separable_features_are_told_apart_by_every_probe(tmp_path, run):
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 6
    x = generator.normal(0, 5, (6, 20))[labels] + generator.normal(0, 0.3, (60, 20))
    np.savez(tmp_path / "f.npz", support_x=x, support_y=labels, query_x=x[::-1], query_y=labels[::-1])
    done = run(COMMAND, "--local_rank=0", "--features", tmp_path / "f.npz", "--shots", "1,5", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = report_in(tmp_path / "out")["results"]
    assert {row["probe"] for row in rows} == set(PROBES) >= {"ridge", "sgd"}
    assert {(row["shots"], row["seed"]) for row in rows} == {(k, s) for k in (1, 5) for s in (0, 1, 2)}
    assert {row["accuracy"] for row in rows} == {1.0}
    assert {row["features"] for row in rows} == {"given"}


def test_given_features_are_scored_from_any_folder(digit_features, tmp_path, run):
    done = run(COMMAND, "--features", digit_features, "--out", "out", "--shots", "1", "--seeds", "0", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(report_in(tmp_path / "out")["results"]) == len(PROBES)


def test_a_network_without_the_features_is_refused_before_those_of_another_are_computed(
    digit_config, checkpoints, tmp_path, run
):
    both = ("--init", checkpoints / "first", "--init", checkpoints / "second")
    done = run(COMMAND, "--config", digit_config, *both, "--out", tmp_path / "out", 'fewshot.features=["tanh"]')
    assert done.returncode == 2, done.stderr
    assert f"the network of {checkpoints / 'second'} has none of these" in done.stderr
    assert "support and" not in done.stdout
    assert not (tmp_path / "out" / "features").exists()


def literal_accuracy(path, shots, seed, l2):
    """The protocol as its page has it, in numpy."""
    with np.load(path) as file:
        x, y, query, query_y = (
            file[name].astype(np.float64) for name in ("support_x", "support_y", "query_x", "query_y")
        )
    generator = np.random.default_rng(seed)
    permuted = [generator.permutation(np.where(y == c)[0]) for c in range(10)]
    rows = np.concatenate([members[:shots] for members in permuted])
    mean, std = x[rows].mean(axis=0), x[rows].std(axis=0) + 1e-5
    design = np.concatenate([(x[rows] - mean) / std, np.full((len(rows), 1), 100.0)], axis=1)
    targets = 2 * np.eye(10)[y[rows].astype(int)] - 1
    weights = np.linalg.solve(design.T @ design + l2 * np.eye(design.shape[1]), design.T @ targets)
    scored = np.concatenate([(query - mean) / std, np.full((len(query), 1), 100.0)], axis=1)
    return float(((scored @ weights).argmax(axis=1) == query_y).mean())


def test_digits_score_what_the_protocol_gives(digit_features, tmp_path, run):
    out = tmp_path / "out"
    done = run(COMMAND, "--features", digit_features, "--out", out, "--shots", "1,5,25", "--seeds", "0,4", "--l2", "64")
    assert done.returncode == 0, done.stderr
    report = report_in(out)
    ridge = [row for row in report["results"] if row["probe"] == "ridge"]
    assert [(row["shots"], row["seed"], row["l2"]) for row in ridge] == [
        (shots, seed, 64.0) for seed in (0, 4) for shots in (1, 5, 25)
    ]
    for row in ridge:
        assert row["accuracy"] == pytest.approx(literal_accuracy(digit_features, row["shots"], row["seed"], 64.0))
    assert done.stdout.splitlines()[-2:] == [f"page: {out}/report/report.html", f"report: {out}/report/report.md"]
    assert "ridge, λ = 64, mean ± std over seeds 0 4" in done.stdout
    assert (out / "report" / "report.md").is_file()
    assert "arning" not in done.stderr


def reproducible(folder):
    """The files of a report by name, without what it says last, of this run: ranks, threads, wall time."""
    parts = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    told = json.loads(parts["report.json"])
    del told["run"]
    for name in parts:
        if name.endswith((".md", ".html")):
            parts[name], _, last = parts[name].rpartition(b"This run")
            assert b"threads" in last
    return parts | {"report.json": json.dumps(told)}


def test_a_report_is_the_same_to_the_byte_for_any_number_of_ranks_and_threads(digit_config, checkpoints, tmp_path, run):
    """Of 1 rank on 1 thread, and 3 on 2. A commit meanwhile would change what the reports say of it."""
    both = ("--init", checkpoints / "first", "--init", checkpoints / "second")
    words = ("--config", digit_config, *both, "model.image_size=16", "fewshot.oracle=true")
    for ranks, threads in ((1, 1), (3, 2)):
        prelude = f"import torch; torch.set_num_threads({threads})"
        out = tmp_path / f"{ranks} {threads}"
        done = run(COMMAND, *words, "--out", out, ranks=ranks, prelude=prelude)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: ") == 1
        told = report_in(out)["run"]
        assert (told["ranks"], told["threads"]) == (ranks, threads)
    first, other = (reproducible(path) for path in sorted(tmp_path.iterdir()))
    assert {"report.json", "report.md", "report.html", "accuracy.png", "oracle.png"} <= set(first)
    assert {name for name in first if first[name] != other.get(name)} == set()
    names = {file.name for file in (tmp_path / "1 1" / "features").iterdir()}
    for name in names:
        assert len({(out / "features" / name).read_bytes() for out in tmp_path.iterdir()}) == 1

    first = report_in(tmp_path / "1 1")
    features = {(row["weights"], row["features"]) for row in first["results"]}
    assert features == {("first", name) for name in ("tanh", "pre_tanh", "cls", "pixels", "untrained")} | {
        ("second", name) for name in ("cls", "untrained")
    }
    assert [one["baselines"] for one in first["weights"]] == [
        {"untrained": "first", "pixels": "first"},
        {"untrained": "second", "pixels": "first"},
    ]
    assert [(one["id"], one["step"], one["image_size"]) for one in first["weights"]] == [
        ("first", 3, 16),
        ("second", 3, 16),
    ]
    means = {(*(row[key] for key in ("weights", "features", "probe")), row["shots"]): row for row in first["summary"]}
    for row in first["comparisons"]["rows"]:
        a, b = (means[(*row[side].values(), row["shots"])]["mean"] for side in "ab")
        assert row["difference"] == pytest.approx(a - b, abs=1e-12)
        assert row["low"] <= row["difference"] <= row["high"]
    compared = [tuple(row["b"].values()) for row in first["comparisons"]["rows"]]
    assert compared[0] == ("second", "cls", "ridge")
    assert ("first", "tanh", "logistic") in compared
    assert "first tanh - second cls" in done.stdout

    again = run(COMMAND, *words, "--out", tmp_path / "1 1")
    assert again.stdout.count("already in") == 5
    assert report_in(tmp_path / "1 1")["results"] == first["results"]


def test_shards_are_asked_for_before_anything_is_computed_and_not_once_it_is(digit_config, checkpoints, tmp_path, run):
    config = json.loads(digit_config.read_text())
    for split in ("support", "query"):
        shutil.copytree(config["data"][split], tmp_path / split)
    words = ("--config", digit_config, "--init", checkpoints / "second", "data.support=" + str(tmp_path / "support"))
    words += ("data.query=" + str(tmp_path / "query"), 'fewshot.features=["cls"]', 'fewshot.probes=["ridge"]')
    first = run(COMMAND, *words, "--out", tmp_path / "one")
    assert first.returncode == 0, first.stderr
    (shard,) = [path for path in sorted((tmp_path / "query").glob("*.tar"))][-1:]
    shard.unlink()
    again = run(COMMAND, *words, "--out", tmp_path / "one")
    assert (again.returncode, again.stdout.count("already in")) == (0, 1), again.stderr
    anew = run(COMMAND, *words, "--out", tmp_path / "two")
    assert anew.returncode == 2
    assert anew.stderr.count("error: ") == 1
    assert str(shard) in anew.stderr
    assert "bytes" not in anew.stderr, "found before it was read"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "absent.npz"], "absent.npz: no such file"),
        (
            ["--features", "DIGITS", "--shots", "500"],
            "500 shots need 500 images of each of 10 classes; class 0 has",
        ),
        (["--features", "DIGITS", "--init", "x"], "--features and --init"),
        (["--features", "DIGITS", "--weights", "averaged"], "--features and --weights averaged: one of the two"),
        (["--config", "fewshot/imagenet.json", "--init", "x"], "data.support: null; set it to an INDEX"),
        (["--config", "CONFIG", "--init", "absent"], "weights absent: no such file"),
        (["--config", "CONFIG", "--init", "x" * 300], f"{'x' * 300}: File name too long"),
        (["--config", "x" * 300, "--init", "x"], f"{'x' * 300}: File name too long"),
        (["--config", "CONFIG"], "--init is missing"),
        (["--config", "CONFIG", "--init", "x", "--every", "ten"], "--every: invalid int value: 'ten'"),
        (["--features", "DIGITS", "--every", "5"], "--features and --every: one of the two"),
        (
            ["--apply", "x", "--init", "x", "--every", "5"],
            "--apply and --every: probes are applied as they were",
        ),
        (
            ["--apply", "x", "--init", "x", "--shots", "5"],
            "--apply and --shots: probes are applied as they were",
        ),
        (
            ["--config", "CONFIG", "--init", "x", 'fewshot.probes=["svm"]'],
            "fewshot.probes: found 'svm'; known: ridge ridge_held_out logistic sgd",
        ),
        (["--features", "DIGITS", "--shots", "1,x"], "fewshot.shots: [1,x] is no JSON"),
        (["--features", "DIGITS", "--shots", "1,1"], "fewshot.shots: found [1, 1]; name each once"),
    ],
)
def test_a_fault_is_status_2_and_one_message(digit_features, digit_config, tmp_path, arguments, message, run):
    places = {"DIGITS": digit_features, "CONFIG": digit_config}
    failed = run(COMMAND, *(places.get(argument, argument) for argument in arguments), "--out", tmp_path / "out")
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("error: ") == 1
    assert failed.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/out", "x" * 300])
@pytest.mark.parametrize("what", ["features", "weights"])
def test_an_out_that_cannot_be_made_is_found_before_anything_is_computed(
    what, out, digit_features, digit_config, checkpoints, tmp_path, run
):
    (tmp_path / "file").write_text("kept")
    given = ("--features", digit_features)
    if what == "weights":
        given = ("--config", digit_config, "--init", checkpoints / "second")
    failed = run(COMMAND, *given, "--out", tmp_path / out)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {tmp_path / out}: ")
    assert failed.stderr.count("\n") == 1, "nothing told of, and no traceback"
    assert failed.stdout == ""
    assert (tmp_path / "file").read_text() == "kept"


def test_a_report_is_written_though_nobody_reads_it_and_another_one_kept(digit_features, tmp_path, run):
    words = ("--features", digit_features, "--seeds", "0", "--out", tmp_path)
    for shots in ("1", "2"):
        assert Forked(1, [*words, "--shots", shots], Path("/dev/full"), script=COMMAND).wait() == [0]
    kept = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("report-1", "report")]
    assert [report["protocol"]["shots"] for report in kept] == [[1], [2]]
    again = run(COMMAND, "--features", digit_features, "--seeds", "0", "--shots", "2", "--out", tmp_path)
    assert "another report" not in again.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"report", "report-1"}


def test_a_table_is_shown_on_a_console_that_is_not_utf_8(digit_features, tmp_path, monkeypatch, run):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run(COMMAND, "--features", digit_features, "--shots", "1", "--seeds", "0", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ridge, \\u03bb = 1024" in done.stdout


def test_saved_probes_are_applied(digit_config, checkpoints, tmp_path, run):
    first, out = checkpoints / "first", tmp_path / "out"
    cheap = ('fewshot.probes=["ridge","nearest_mean"]', 'fewshot.features=["tanh"]')
    done = run(COMMAND, "--config", digit_config, "--init", first, "--out", out, *cheap)
    assert done.returncode == 0, done.stderr
    query = f"data.query={json.loads(digit_config.read_text())['data']['query']}"
    done = run(COMMAND, "--apply", out, "--init", first, query, "--out", tmp_path / "new", ranks=2)
    assert done.returncode == 0, done.stderr
    applied = json.loads((tmp_path / "new" / "applied" / "report.json").read_text())
    keys = ("probe", "features", "shots", "seed", "l2", "accuracy")
    told = [[[row[key] for key in keys] for row in report["results"]] for report in (report_in(out), applied)]
    assert told[0] == told[1]
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path}/new/applied/report.json"
    for words, message in (
        (("--apply", out, "--init", checkpoints / "second", query), "these weights have sha256"),
        (("--apply", out, query), "--apply and no --init"),
        (("--apply", tmp_path / "new", "--init", first, query), "no probes.safetensors"),
    ):
        failed = run(COMMAND, *words, "--out", tmp_path / "none")
        assert failed.returncode == 2
        assert message in failed.stderr
        assert failed.stderr.count("error: ") == 1
