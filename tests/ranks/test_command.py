"""Who tells of what ends a command: rank 0 for all, and a rank that may be alone with what it has found."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.ranks.command import CommandLineError, Parser

ROOT = Path(__file__).resolve().parents[2]
HOST = socket.gethostname()


HASTY = """
from pretrain.ranks import command
command._OTHERS_FIRST = 0
"""
SCRIPT = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ended(rank: int, local_rank: int, *words: object) -> str:
    """What a rank of four says, whose words end it with status 2."""
    words = ("-c", HASTY + words[1]) if words[0] == "-c" else ("-c", HASTY + SCRIPT, *words)
    place = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(local_rank), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("rank", "local_rank", "who"), [(0, 0, ""), (1, 1, None), (2, 0, f"rank 2 ({HOST}): "), (3, 1, None)]
)
@pytest.mark.parametrize("script", ["pretrain", "finetune", "fewshot"])
def test_a_config_that_a_host_lacks_is_told_once_by_each_host(script, rank, local_rank, who):
    words = [f"launch/{script}.py", f"--local-rank={local_rank}"]  # as torch.distributed.launch gives it
    words += ["--config", "/no/such.json", *(["--init", "x"] if script != "pretrain" else [])]
    said = ended(rank, local_rank, *words)
    if who is None:
        assert said == ""
    else:
        assert said.startswith(f"error: {who}config /no/such.json: no such file"), said
        assert said.count("error: ") == said.count("\n") == 1


def test_a_mistake_in_the_command_is_every_ranks_and_rank_0_tells_it():
    words = ("launch/pretrain.py", "--confg", "x")
    assert ended(0, 0, *words).startswith("error: the following arguments are required: --config")
    assert ended(2, 0, *words) == ""


@pytest.mark.parametrize("words", [["--init", ""], ["--init="], ["a.b=1", ""]])
def test_an_empty_word_is_no_word(words):
    parser = Parser(prog="x")
    parser.add_argument("--init")
    parser.add_argument("overrides", nargs="*")
    with pytest.raises(
        CommandLineError, match=f"nothing is given after {'a.b=1' if len(words[0]) == 5 else '--init'};"
    ):
        parser.parse_intermixed_args(words)
    assert parser.parse_intermixed_args(["--init", "w", "a.b=1"]).overrides == ["a.b=1"]


NO_COMPILER = """
from pretrain.engine import processgroup
from pretrain.ranks.command import run_command
run_command(processgroup.start)
"""


@pytest.mark.parametrize(("rank", "local_rank", "speaks"), [(2, 0, True), (3, 1, False)])
def test_a_host_without_a_compiler_says_so(rank, local_rank, speaks, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = ended(rank, local_rank, "-c", NO_COMPILER)
    assert [line for line in said.splitlines() if line.startswith("error: ")] == speaks * [
        f"error: rank {rank} ({HOST}): DeepSpeed compiles C++ ops, and there is no 'no-such-compiler': install g++ "
        "(Debian: apt-get install g++)"
    ], said


ALONE = """
from pretrain.errors import InputError
from pretrain.ranks.command import run_command
def main():
    error = InputError("only here")
    error.only_this_rank = %s
    raise error
run_command(main)
"""


@pytest.mark.parametrize("alone", [True, False])
def test_what_only_one_rank_can_know_it_tells_itself(alone):
    assert ended(3, 1, "-c", ALONE % alone) == alone * f"error: rank 3 ({HOST}): only here\n"


SLOW = """
from pretrain.ranks import command
from pretrain.errors import InputError
command._OTHERS_FIRST = 60
def main():
    print(flush=True)
    raise InputError("all know this")
command.run_command(main)
"""


def test_a_rank_that_does_not_speak_waits_for_those_that_do_and_is_ended_with_their_status():
    silent = subprocess.Popen(
        [sys.executable, "-c", SLOW],
        cwd=ROOT,
        env={**os.environ, "RANK": "1", "LOCAL_RANK": "1"},
        stdout=subprocess.PIPE,
    )
    silent.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        silent.wait(1)
    silent.terminate()
    assert silent.wait(10) == 2


MET = """
import os
from pretrain.engine import processgroup
from pretrain.errors import InputError
from pretrain.ranks.command import run_command

def main():
    processgroup.start()
    os.environ.update(RANK="2", LOCAL_RANK="0")  # as the first of another host
    raise InputError("all know this")

os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_PORT="0")
run_command(main)
"""


def test_ranks_that_have_met_leave_it_to_rank_0():
    assert ended(2, 0, "-c", MET) == ""


NO = """
import errno, os
from pretrain.ranks.command import run_command
def main():
    raise OSError(errno.%s, os.strerror(errno.%s), "/there/it")
run_command(main)
"""


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("ENOSPC", "/there/it: No space left on device; make room there, or name a place on another disk"),
        ("ESTALE", "/there/it: cannot be reached for now: Stale file handle"),
    ],
)
def test_what_the_file_system_refuses_is_no_defect(number, said):
    assert ended(0, 0, "-c", NO % (number, number)) == f"error: {said}\n"


def test_a_file_that_is_gone_is_a_defect_where_nobody_asked_whether_it_is_there():
    done = subprocess.run([sys.executable, "-c", NO % ("ENOENT", "ENOENT")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr[:9]) == (1, "Traceback")


FAILING = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from pretrain.ranks.command import run_command

def main():
    begun = threading.Event()
    ThreadPoolExecutor(1).submit(lambda: (begun.set(), threading.Event().wait()))  # as a read that storage holds up
    begun.wait()
    raise %s("unforeseen")

run_command(main)
"""


@pytest.mark.parametrize(("error", "status"), [("RuntimeError", 1), ("KeyboardInterrupt", 130)])
def test_a_defect_is_a_traceback_and_the_end_whatever_a_thread_waits_for(error, status):
    done = subprocess.run(
        [sys.executable, "-c", FAILING % error], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=30, check=False
    )
    assert done.returncode == status
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith(f"{error}: unforeseen\n")


CLOSED = """
import sys
from pretrain.ranks.command import run_command
%s
run_command(lambda: 75)
"""


@pytest.mark.parametrize("closing", ["sys.stdout = sys.stderr = None", "sys.stdout.close(); sys.stderr.close()"])
def test_a_command_without_its_streams_ends_with_its_status(closing):
    assert subprocess.run([sys.executable, "-c", CLOSED % closing], cwd=ROOT, timeout=30).returncode == 75
