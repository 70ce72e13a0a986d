"""`python launch/shards.py …` as a user calls it."""

import json
import os
import subprocess
import sys

import pytest

from tests.system.inprocess import ROOT, run_here


def shards(*arguments, status=0):
    """Run the command; returns stdout, or stderr where it is to fail."""
    done = run_here("shards.py", *arguments)
    assert done.status == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "test"
    out = shards("build", "digits", folder, "--split", "test", "--shard-samples", 100)
    assert out.startswith("digits, split test: 355 samples, 10 classes, one label each; shards: 4\n")
    return folder


def test_what_is_built_verifies_and_is_not_built_twice(digits):
    assert "in order: 355 samples" in shards("verify", digits)
    assert shards("build", "digits", digits, "--split", "test", "--shard-samples", 100).startswith("already built")
    error = shards("build", "digits", digits, status=2)
    assert f"error: {digits}: holds another data set (split is 'test', asked for 'train'" in error


def test_indexing_what_was_built_finds_the_same_samples(digits, tmp_path):
    out = shards("index", f"{digits}/shard-{{000000..000003}}.tar", "--out", tmp_path / "again.vfi")
    assert out.startswith("indexed: 355 samples, 10 classes")
    assert json.loads(shards("stats", digits, "--json"))["hash"] == out.split()[-1]


def test_order_prints_the_ids_of_each_step(digits):
    arguments = ("order", digits, "--global-batch", 100, "--seed", 3, "--steps")
    lines = [json.loads(line) for line in shards(*arguments, "0:8").splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert all(len(line["ids"]) == 100 for line in lines)
    ids = [number for line in lines for number in line["ids"]]
    assert sorted(ids[:355]) == list(range(355))
    assert sorted(ids[355:710]) == list(range(355))
    assert [json.loads(line) for line in shards(*arguments, "5:7").splitlines()] == lines[5:7]
    assert shards(*arguments, "4:4") == ""


def test_order_into_a_pipe_that_closes_is_no_fault(digits):
    order = f"{sys.executable} launch/shards.py order {digits} --global-batch 300 --seed 0 --steps 0:2000"
    command = f"{order} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_locate_prints_one_sample(digits):
    found = json.loads(shards("locate", digits, 150))
    assert set(found) == {"id", "shard", "key", "offset", "bytes", "label"}
    assert found["shard"] == str(digits / "shard-000001.tar")
    assert json.loads(shards("locate", digits, digits, 355 + 150)) == {**found, "id": 505}


@pytest.mark.parametrize("number", ["355", "-1"])
def test_an_id_out_of_range_is_status_2(digits, number):
    error = shards("locate", digits, number, status=2)
    assert error == f"error: id {number} is out of range; this index has ids 0 … 354\n"


def test_a_folder_without_an_index_names_a_command_that_makes_it(digits, tmp_path):
    (tmp_path / "a.tar").write_bytes((digits / "shard-000000.tar").read_bytes())
    error = shards("stats", tmp_path, status=2)
    command = error.strip().partition("make it with: python launch/shards.py ")[2].split()
    assert command == ["index", str(tmp_path)]
    shards(*command)
    assert "samples   100" in shards("stats", tmp_path)


def test_a_truncated_shard_is_status_2_with_its_name(digits, tmp_path):
    (tmp_path / "a.tar").write_bytes((digits / "shard-000000.tar").read_bytes()[:5000])
    error = shards("index", tmp_path, status=2)
    assert error.startswith(f"error: {tmp_path}/a.tar: truncated: 5000 bytes, cut in")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("build", "digits"),
        ("order", "INDEX", "--global-batch", "0", "--seed", "0", "--steps", "0:1"),
        ("order", "INDEX", "--global-batch", "4", "--seed", "0", "--steps", "3:1"),
        ("order", "INDEX", "--global-batch", "4", "--seed", "-1", "--steps", "0:1"),
        ("order", "/nowhere", "--global-batch", "4", "--seed", "0", "--steps", "0:1"),
        ("build", "cinfar10", "out"),
        ("index", "pipe:cat a.tar"),
    ],
)
def test_what_cannot_be_is_status_2(digits, arguments):
    assert shards(*(digits if argument == "INDEX" else argument for argument in arguments), status=2)


def test_the_command_runs_from_any_folder_and_light(digits, tmp_path):
    """What only reads an index does not wait for torch, and --help for nothing."""

    def run(*arguments):
        command = [sys.executable, "-X", "importtime", ROOT / "launch" / "shards.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout, {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}

    place = os.path.relpath(digits, tmp_path)
    out, imported = run("locate", place, "0")
    assert json.loads(out)["shard"] == str(digits / "shard-000000.tar")
    assert imported & {"torch", "numpy"} == {"numpy"}
    _, imported = run("order", place, "--global-batch", "2", "--seed", "0", "--steps", "0:1")
    assert imported & {"torch", "numpy"} == {"numpy"}
    _, imported = run("--help")
    assert not imported & {"torch", "numpy"}


def test_stats_draws_a_page_of_one_or_several_indices(digits, tmp_path):
    page = tmp_path / "set.html"
    figures = json.loads(shards("stats", digits, digits, "--json", "--html", page, "--images", 50))
    assert (figures["samples"], figures["images"]["read"], figures["images"]["unreadable"]) == (710, 50, 0)
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert f"Index hash {figures['hash']}" in html
    assert html.count("data:image/") == 48 + 2 * 2  # pictures; classes and shards, light and dark
    assert set(tmp_path.iterdir()) == {page}


def test_stats_says_what_it_wrote(digits, tmp_path):
    page = tmp_path / "set.html"
    assert shards("stats", digits, "--html", page, "--images", 5).splitlines()[-1] == f"written: {page}"


def test_stats_keeps_to_what_scripts_read(digits):
    figures = json.loads(shards("stats", digits, "--json", "--images", 20))
    keys = {"samples", "hash", "bytes", "bytes_per_sample", "shards", "labels", "classes", "images"}
    assert keys <= set(figures)
    assert {"read", "width", "height", "formats", "unreadable"} <= set(figures["images"])
    assert figures["classes"]["most"][0].keys() == {"class", "label", "samples"}
    assert figures["sample_bytes"] == {"min": 2048, "median": 2048.0, "max": 2048}


def test_a_page_that_cannot_be_written_is_status_2_before_anything_is_counted(digits, tmp_path):
    error = shards("stats", digits, "--html", tmp_path / "no" / "x.html", status=2)
    assert error == f"error: {tmp_path}/no/x.html: cannot be written: there is no folder {tmp_path}/no\n"


def test_help_names_every_command_and_source():
    text = shards("--help")
    for command in ("build", "index", "verify", "stats", "order", "locate"):
        assert f"    {command}" in text
    text = " ".join(shards("build", "--help").split())
    named = ("mnist5k", "digits", "fashion-mnist", "cifar100", "flowers", "pets", "imagenet:FOLDER")
    for source in (*named, "iNaturalist", "SUN397", "Places365"):
        assert source in text
