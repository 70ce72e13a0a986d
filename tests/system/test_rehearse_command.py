"""A rehearsal finds what the real run would fail for, names it, ends with status 2, and leaves nothing behind."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.started import Forked

ROOT = Path(__file__).resolve().parents[2]
# However busy the machine is, training on the digits reaches this share of its rate on a cached batch.
EASY = ("--live", "0.02", "--seconds", "1")
PARTS = ["memory planned", "worst-case step", "loader", "storage", "save", "restore on 1 of 2 ranks", "restore"]
PARTS += ["evaluation", "few-shot", "signal", "export"]
# Executed by every Python that the ranks of the rehearsed run are: decoding takes long, and as many ranks as wrote a
# checkpoint are needed to read it.
FAULTS = """
import os
import time
from pretrain.engine import restore
from pretrain.errors import InputError
from pretrain.images import decode

original, reader = decode.decode, restore.restore

def slow(*arguments):
    time.sleep(0.05)
    return original(*arguments)

def stubborn(engine, saved, advance):
    if saved.state["ranks"] != int(os.environ["WORLD_SIZE"]):
        raise InputError(f"checkpoint {saved.path}: its optimizer's state is of {saved.state['ranks']} ranks")
    return reader(engine, saved, advance)

decode.decode, restore.restore = slow, stubborn
"""

# Each rank of the rehearsed run may allocate this much beyond its imports, and no more: less than its network takes.
STARVED = """
import resource
from pathlib import Path
from pretrain.training import setup

original = setup.prepare

def starved(*given):
    [held] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    limit = 1024 * int(held.split()[1]) + (256 << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return original(*given)

setup.prepare = starved
"""


@pytest.fixture
def config(tiny_config, digits, tmp_path) -> Path:
    sets = {"support": str(digits / "train"), "query": str(digits / "test")}
    return tiny_config(
        tmp_path / "tiny.json", data={"eval": str(digits / "test")}, fewshot={"every": 10, "shots": [1], **sets}
    )


def report(out: Path) -> dict:
    assert sorted(path.name for path in out.iterdir()) == [".claim", "rehearsal.html", "rehearsal.json"]
    return json.loads((out / "rehearsal.json").read_text())


def test_a_run_s_folder_is_refused(run, config, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = run("launch/rehearse.py", "--config", config, "--out", tmp_path)
    assert done.returncode == 2
    assert f"error: --out {tmp_path}: holds a run (config.json)" in done.stderr


@pytest.mark.long
def test_a_sound_run_passes_every_part(run, config, tmp_path):
    done = run("launch/rehearse.py", "--config", config, "--out", tmp_path / "out", *EASY, ranks=2)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    found = report(tmp_path / "out")
    assert [row["part"] for row in found["findings"]] == PARTS
    assert {row["verdict"] for row in found["findings"]} <= {"ok", "note"}, done.stdout
    assert "verdict: tiny would run" in done.stdout


@pytest.mark.long
def test_faults_are_found_and_named(run, config, tmp_path, monkeypatch):
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'faults'}:{ROOT}")
    words = ("--grace", "0.01", "--device-memory", "0.001", "--live", "0.5", "--seconds", "1")
    done = run("launch/rehearse.py", "--config", config, "--out", tmp_path / "out", *words, ranks=2)
    assert done.returncode == 2, f"{done.stdout}{done.stderr}"
    found = report(tmp_path / "out")
    seen = {row["part"]: row["seen"] for row in found["findings"]}
    assert found["fails"] == ["memory planned", "worst-case step", "loader", "restore on 1 of 2 ranks", "signal"]
    assert "its optimizer's state is of 2 ranks" in seen["restore on 1 of 2 ranks"]
    assert f"verdict: tiny would fail: {', '.join(found['fails'])}" in done.stdout


@pytest.mark.long
def test_ranks_that_run_out_of_memory_are_named(run, tiny_config, tmp_path, monkeypatch):
    """The system refuses them memory, while the plan holds: what it counts is all there."""
    large = tiny_config(tmp_path / "large.json", model={"width": 768, "mlp": 3072, "layers": 6})
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(STARVED)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'faults'}:{ROOT}")
    done = run("launch/rehearse.py", "--config", large, "--out", tmp_path / "out", *EASY, ranks=2)
    assert done.returncode == 2, f"{done.stdout}{done.stderr}"
    findings = {row["part"]: row for row in report(tmp_path / "out")["findings"]}
    assert findings["memory planned"]["verdict"] == "ok"
    step = findings["worst-case step"]
    assert step["verdict"] == "fails"
    assert "allocate memory" in step["seen"]
    assert "train.micro_batch" in step["change"]
    assert "allocate memory" in findings["save"]["seen"]
    assert "verdict: tiny would fail: worst-case step, save" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("room", ["40k", "128k"])
def test_a_full_disk_is_found(run, config, tmp_path, room):
    """Room for no checkpoint, and for fewer than the run keeps."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system of a given size cannot be mounted here: that needs root")
    try:
        done = run("launch/rehearse.py", "--config", config, "--out", disk / "out", *EASY, ranks=2)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.returncode == 2, f"{done.stdout}{done.stderr}"
    assert "verdict: tiny would fail: save" in done.stdout, done.stdout
    assert "save: room on the disk of --out" in done.stdout


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (signal.SIGTERM, "part 1 of 5"),
        pytest.param(signal.SIGINT, "part 2 of 5", marks=pytest.mark.long),  # a run trains and saves in the folder
    ],
)
def test_an_interrupt_leaves_no_process_and_no_scratch_folder(number, part, config, tmp_path):
    out, words = tmp_path / "out", ["--config", config, *EASY]
    started = Forked(2, [*words, "--out", out], tmp_path / "said.txt", script="launch/rehearse.py")
    try:
        children = until(started, lambda: part in started.said and of_ranks(started))
        started.send(number)
        time.sleep(0.02)
        started.send(number)  # launchers send theirs besides the terminal's
        assert started.wait(60) == [130, 130], started.said
    finally:
        started.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert [path.name for path in out.iterdir()] == [".claim"]
    assert "interrupted: the rehearsed run's processes are ended, its scratch folder is gone" in started.said


def of_ranks(started: Forked) -> list[psutil.Process]:
    """The rehearsed run's processes, once each rank of the rehearsal has started its own."""
    found = [child for pid in started.pids for child in psutil.Process(pid).children()]
    return found if len(found) == len(started.pids) else []


def until(started: Forked, found: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    """What is found, as soon as anything is."""
    deadline = time.monotonic() + 300
    while not (there := found()):
        assert started.running, started.said
        assert time.monotonic() < deadline, started.said
        time.sleep(0.02)
    return there
