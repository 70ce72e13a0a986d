"""A console on a full disk, that nobody reads any more, or that is not UTF-8, does not end a run."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.started import Forked
from pretrain.console import deliver, printable, say
from pretrain.errors import InputError
from tests.conftest import history

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def test_what_cannot_be_written_is_lost_and_the_next_is_not(capsys):
    full = open("/dev/full", "w")  # noqa: SIM115
    say("lost", to=full)
    with pytest.raises(OSError, match="No space left"):
        full.close()  # which tries once more
    say("heard")
    say("heard too", to=sys.stderr)
    assert capsys.readouterr() == ("heard\n", "heard too\n")


def test_what_an_encoding_lacks_is_escaped():
    for encoding, text, written in (
        ("ascii", "λ = 1", b"\\u03bb = 1\n"),
        ("cp1252", "λ ± é", b"\\u03bb \xb1 \xe9\n"),
        ("utf-8", "\udcff, of a name that is no UTF-8", b"\\udcff, of a name that is no UTF-8\n"),
    ):
        stream = io.TextIOWrapper(told := io.BytesIO(), encoding=encoding)
        say(text, to=stream)
        assert told.getvalue() == written


def test_what_would_control_the_terminal_is_escaped(capsys):
    say("a\x1b]0;title\x07b\r\u202ec\x9bK\nλ 고양이 👩\u200d💻")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\\r\\u202ec\\x9bK\nλ 고양이 👩\u200d💻\n"
    assert printable("one\nline \udcff") == "one\\nline \\udcff"


def test_a_result_that_cannot_be_written_is_told_and_a_reader_that_has_gone_is_not(monkeypatch, capsys):
    deliver(["1", "2"])
    assert capsys.readouterr().out == "1\n2\n"
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(InputError, match="stdout: cannot be written: No space left on device"):
        deliver(["1"])
    with pytest.raises(OSError, match="No space left"):
        full.close()
    there, here = os.pipe()
    os.close(there)
    asked = iter(range(9))
    monkeypatch.setattr(sys, "stdout", open(here, "w"))  # noqa: SIM115
    deliver(map(str, asked))
    assert next(asked) == 1


def test_what_is_said_to_a_closed_stream_is_lost():
    closed = io.StringIO()
    closed.close()
    say("lost", to=closed)


def test_streams_that_are_closed_from_the_beginning_lead_nowhere(tmp_path):
    script = """
import os, sys
from pretrain.console import say
from pretrain.ranks.command import run_command

def command():
    with open(sys.argv[1], "w") as file:
        say("told", to=sys.stderr)
        os.write(2, b"of a library")
        file.write(f"terminal: {sys.stderr.isatty()}")
    return 0

run_command(command)
"""
    line = f'"{sys.executable}" -c "$0" "$1" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", line, script, tmp_path / "file"], cwd=ROOT, timeout=60)
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "terminal: False")


def test_a_run_trains_evaluates_and_saves_to_its_end(tiny_config, digits, tmp_path):
    train = {"steps": 6, "eval_every": 3}
    config = tiny_config(
        tmp_path / "mute.json", data={"eval": str(digits / "test")}, train=train, checkpoint={"every": 2}
    )
    words, errors = ["--config", config, "--out", tmp_path / "run"], tmp_path / "errors.txt"
    assert Forked(1, words, Path("/dev/full"), errors=errors).wait() == [0]
    assert errors.read_text() == ""
    told = history(tmp_path / "run")
    assert [step for step, *_ in told.losses] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in told.metrics if "eval/top1" in line] == [3, 6]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000006"


def test_an_error_that_cannot_be_told_has_its_status_all_the_same():
    assert Forked(1, ["--config", "/no/such.json"], Path("/dev/full")).wait() == [2]
