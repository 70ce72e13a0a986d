"""Damage met in the middle of a run: every rank ends with one message, or goes on with what is wrong written down."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.index.index import Index
from tests.conftest import history, lines

PRETRAIN = "launch/pretrain.py"
STEPS = 30  # of 24 images: 720 of the 1,442, each at most once
CHANGE = range(16, 17)  # a step in which every lane begins a chunk


@pytest.fixture
def config(digits: Path, tiny_config, tmp_path: Path) -> Path:
    shutil.copytree(digits / "train", tmp_path / "train")
    return tiny_config(
        tmp_path / "tiny.json",
        data={"train": str(tmp_path / "train"), "audit": True},
        train={"steps": STEPS},
        checkpoint={"every": 5, "keep": 9},
    )


def trained(out: Path) -> list[int]:
    """The ids of all steps in order, ranks joined."""
    ids = history(out).ids
    assert len(ids) == STEPS
    return [number for step in ids for number in step]


def damage_images(folder: Path, ids: list[int]) -> None:
    """Overwrite the encoded images: the tar stays whole, the images are none."""
    index = Index.open(folder)
    for u in ids:
        (place,) = index.extents([u])
        with open(place.url, "r+b") as file:
            data = file.read()
            file.seek(data.index(b"\x89PNG", place.begin))
            file.write(b"no image")


def damage_header(folder: Path, u: int) -> None:
    """Overwrite a sample's first header; the shard keeps its size."""
    (place,) = Index.open(folder).extents([u])
    with open(place.url, "r+b") as file:
        file.seek(place.begin)
        file.write(b"\xa5" * 512)


def ids_of(config: Path, run, steps: range) -> list[list[int]]:
    words = ("order", config.parent / "train", "--global-batch", 24, "--seed", 0)
    order = run("launch/shards.py", *words, "--steps", f"{steps.start}:{steps.stop}")
    return [json.loads(line)["ids"] for line in order.stdout.splitlines()]


def test_a_chunk_that_one_rank_cannot_read_ends_all_ranks_with_one_message(config, run, tmp_path):
    u = ids_of(config, run, CHANGE)[0][17]
    damage_header(tmp_path / "train", u)
    done = run(PRETRAIN, "--config", config, "--out", tmp_path / "out", ranks=2)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    (place,) = Index.open(tmp_path / "train").extents([u])
    assert "error: step 17: " in said
    assert place.url in said
    assert 'data.unreadable_chunks="quarantine"' in said
    # What came before is saved, up to the step, and that left no trace but its quarantine.
    assert (tmp_path / "out/checkpoints/latest").read_text() == "step_00000016"
    assert [line["step"] for line in lines(tmp_path / "out/metrics.jsonl")] == list(range(1, 17))


@pytest.mark.parametrize("chunks", ["stop", pytest.param("quarantine", marks=pytest.mark.long)])
def test_storage_that_goes_away_ends_the_run_with_a_checkpoint_to_go_on_from(config, run, serve, tmp_path, chunks):
    server, out = serve(tmp_path / "train"), tmp_path / "out"
    shards = [f"{server.http}/{path.name}" for path in sorted((tmp_path / "train").glob("*.tar"))]
    assert run("launch/shards.py", "index", *shards, "--out", tmp_path / "far.vfi").returncode == 0
    command = (PRETRAIN, "--config", config, "--out", out, f"data.train={tmp_path / 'far.vfi'}")
    command += (f"data.unreadable_chunks={chunks}",)
    server.requests.clear()
    server.usual, server.good = 503, 70  # of about 120
    done = run(*command, "data.patience_minutes=0.02", ranks=2)
    said = done.stdout + done.stderr
    assert done.returncode == 75, said
    assert said.count("503 Service Unavailable; given up after") == 1
    assert "run the same command again to resume" in said
    assert "error:" not in said
    stopped = lines(out / "metrics.jsonl")[-1]["step"]
    assert 0 < stopped < STEPS
    assert (out / "checkpoints/latest").read_text() == f"step_{stopped:08d}"

    done = run(*command, "data.patience_minutes=0.02", ranks=2)  # it has not come back yet
    assert (done.returncode, "stopped: " in done.stdout) == (75, True), done.stdout + done.stderr
    server.usual = None
    done = run(*command, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = trained(out)
    assert seen == [u for ids in ids_of(config, run, range(STEPS)) for u in ids]
    assert not (out / "quarantine.jsonl").exists() or not lines(out / "quarantine.jsonl"), "its samples were good"


@pytest.mark.parametrize("of", ["validation", pytest.param("few-shot", marks=pytest.mark.long)])
def test_storage_that_goes_away_during_an_evaluation_costs_no_step(config, run, digits, serve, tmp_path, of):
    shutil.copytree(digits / "test", tmp_path / "test")
    server, out, far = serve(tmp_path / "test"), tmp_path / "out", tmp_path / "far.vfi"
    shards = [f"{server.http}/{path.name}" for path in sorted((tmp_path / "test").glob("*.tar"))]
    assert run("launch/shards.py", "index", *shards, "--out", far).returncode == 0
    fewshot = {"every": 20, "support": str(tmp_path / "train"), "query": str(far)}
    change = [f"data.eval={far}", "train.eval_every=20"] if of == "validation" else [f"fewshot={json.dumps(fewshot)}"]
    command = (PRETRAIN, "--config", config, "--out", out, "checkpoint.every=null", *change)
    server.usual, server.good = 503, len(server.requests) + len(shards) + 3
    done = run(*command, "data.patience_minutes=0.02")
    assert done.returncode == 75, done.stdout + done.stderr
    assert "503 Service Unavailable; given up after" in done.stdout
    assert (out / "checkpoints/latest").read_text() == "step_00000020"

    done = run(*command, "data.patience_minutes=0.02")  # it has not come back yet
    assert (done.returncode, "stopped: " in done.stdout) == (75, True), done.stdout + done.stderr
    server.usual = None
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    told = lines(out / "metrics.jsonl")
    name = "eval/top1" if of == "validation" else "fewshot/5shot_ridge"
    assert [line["step"] for line in told if name in line] == [20, STEPS]
    assert [line["step"] for line in told if "loss" in line] == list(range(1, STEPS + 1))
    assert len(trained(out)) == STEPS * 24


def test_its_samples_are_quarantined_where_the_config_says_so(config, run, tmp_path):
    u = ids_of(config, run, CHANGE)[0][17]
    damage_header(tmp_path / "train", u)
    out = tmp_path / "out"
    done = run(PRETRAIN, "--config", config, "--out", out, "data.unreadable_chunks=quarantine", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    written = lines(out / "quarantine.jsonl")
    seen = trained(out)
    assert {line["id"] for line in written} == {u}, "the others of its chunk are none the worse"
    assert len(written) == seen.count(u) > 0
    assert all(line["key"] is None and line["id"] in seen[24 * line["step"] :][:24] for line in written)
    assert lines(out / "metrics.jsonl")[-1]["data/unreadable"] == len(written)


def test_unreadable_images_are_written_down_once_whatever_happens_to_the_run(config, run, tmp_path):
    bad = [ids[step] for step, ids in enumerate(ids_of(config, run, range(10, 16)))]
    damage_images(tmp_path / "train", bad)
    out = tmp_path / "out"
    command = (PRETRAIN, "--config", config, "--out", out)
    first = run(*command, "data.max_unreadable=0.00045")  # 4.5 of the last 10,000
    assert first.returncode == 2
    assert "5 of the last 10,000 images could not be read, above data.max_unreadable=0.00045" in first.stderr
    assert len(lines(out / "quarantine.jsonl")) == 5
    assert (out / "checkpoints/latest").read_text() == "step_00000014"

    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("cannot be read") == 1
    index = Index.open(tmp_path / "train")
    written = lines(out / "quarantine.jsonl")
    assert [line["id"] for line in written] == bad
    assert [line["step"] for line in written] == list(range(10, 16))
    for line in written:
        (place,) = index.extents([line["id"]])
        assert (line["url"], line["offset"], line["epoch"]) == (place.url, place.begin, 0)
        assert line["key"]
        assert "not JPEG, PNG or WebP" in line["error"]
    assert len(lines(out / "quarantine.discarded.jsonl")) == 1, "of the step that was not made"
    assert len(trained(out)) == STEPS * 24


def test_where_the_time_goes_is_in_every_logged_line(config, run, tmp_path):
    done = run(PRETRAIN, "--config", config, "--out", tmp_path / "out", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "out/quarantine.jsonl").exists()
    for line in lines(tmp_path / "out/metrics.jsonl"):
        for part in ("read", "starved", "decode", "augment", "collate", "wait"):
            mean, worst = line[f"data/{part}_ms"], line[f"data/{part}_ms_worst"]
            assert 0 <= mean <= worst <= 2 * mean * (1 + 1e-9)
        assert line["data/unreadable"] == 0
    assert sum(line["data/decode_ms"] > 0 for line in lines(tmp_path / "out/metrics.jsonl")) > STEPS / 2
