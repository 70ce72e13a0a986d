"""Who tells of what ends a command: rank 0 for all, and a rank that may be alone with what it has found."""

import os
import signal
import socket
import time

import pytest

from benchmarks.started import Forked
from pretrain.ranks.command import CommandLineError, Parser

HOST = socket.gethostname()
HASTY = "from pretrain.ranks import command; command._OTHERS_FIRST = 0"


@pytest.fixture
def begin(tmp_path):
    """begin(script or code, *words, rank=0, local_rank=0): one rank of four, and the files of its outputs."""

    def begin(script, *words, rank=0, local_rank=0):
        out, errors = tmp_path / "out.txt", tmp_path / "errors.txt"
        for file in (out, errors):
            file.unlink(missing_ok=True)
        if "\n" in script:
            (tmp_path / "code.py").write_text(script)
            script = tmp_path / "code.py"
        place = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(local_rank), "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **place, "DS_ACCELERATOR": "cpu"}
        return Forked(1, words, out, script=script, prelude=HASTY, errors=errors, environment=environment), out, errors

    return begin


@pytest.fixture
def ended(begin):
    """ended(script or code, *words, rank=0, local_rank=0, status=2): what a rank of four says on stderr."""

    def ended(script, *words, status=2, **place):
        started, out, errors = begin(script, *words, **place)
        try:
            found = started.wait()
        finally:
            started.kill()
        assert (found, out.read_text()) == ([status], ""), errors.read_text()
        return errors.read_text()

    return ended


@pytest.mark.parametrize(
    ("script", "rank", "local_rank", "who"),
    [
        ("pretrain", 0, 0, ""),
        ("pretrain", 1, 1, None),
        ("pretrain", 2, 0, f"rank 2 ({HOST}): "),
        ("pretrain", 3, 1, None),
        ("finetune", 2, 0, f"rank 2 ({HOST}): "),
        ("fewshot", 2, 0, f"rank 2 ({HOST}): "),
    ],
)
def test_a_config_that_a_host_lacks_is_told_once_by_each_host(script, rank, local_rank, who, ended):
    words = [f"--local-rank={local_rank}"]  # as torch.distributed.launch gives it
    words += ["--config", "/no/such.json", *(["--init", "x"] if script != "pretrain" else [])]
    said = ended(f"launch/{script}.py", *words, rank=rank, local_rank=local_rank)
    if who is None:
        assert said == ""
    else:
        assert said.startswith(f"error: {who}config /no/such.json: no such file"), said
        assert said.count("error: ") == said.count("\n") == 1


def test_a_mistake_in_the_command_is_every_ranks_and_rank_0_tells_it(ended):
    words = ("launch/pretrain.py", "--confg", "x")
    assert ended(*words).startswith("error: the following arguments are required: --config")
    assert ended(*words, rank=2) == ""


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
def test_a_host_without_a_compiler_says_so(rank, local_rank, speaks, ended, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = ended(NO_COMPILER, rank=rank, local_rank=local_rank)
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
def test_what_only_one_rank_can_know_it_tells_itself(alone, ended):
    assert ended(ALONE % alone, rank=3, local_rank=1) == alone * f"error: rank 3 ({HOST}): only here\n"


SLOW = """
from pretrain.ranks import command
from pretrain.errors import InputError
command._OTHERS_FIRST = 60
def main():
    print(flush=True)
    raise InputError("all know this")
command.run_command(main)
"""


def test_a_rank_that_does_not_speak_waits_for_those_that_do_and_is_ended_with_their_status(begin):
    silent, out, errors = begin(SLOW, rank=1, local_rank=1)
    try:
        until = time.monotonic() + 600
        while not out.read_text() and time.monotonic() < until:
            time.sleep(0.02)
        assert silent.wait(1) == [None]
        silent.send(signal.SIGTERM)
        assert silent.wait() == [2]
        assert errors.read_text() == ""
    finally:
        silent.kill()


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


def test_ranks_that_have_met_leave_it_to_rank_0(ended):
    assert ended(MET) == ""


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
def test_what_the_file_system_refuses_is_no_defect(number, said, ended):
    assert ended(NO % (number, number)) == f"error: {said}\n"


def test_a_file_that_is_gone_is_a_defect_where_nobody_asked_whether_it_is_there(ended):
    assert ended(NO % ("ENOENT", "ENOENT"), status=1).startswith("Traceback")


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
def test_a_defect_is_a_traceback_and_the_end_whatever_a_thread_waits_for(error, status, ended):
    said = ended(FAILING % error, status=status)
    assert said.startswith("Traceback (most recent call last):\n")
    assert said.endswith(f"{error}: unforeseen\n")


CLOSED = """
import sys
from pretrain.ranks.command import run_command
%s
run_command(lambda: 75)
"""


@pytest.mark.parametrize("closing", ["sys.stdout = sys.stderr = None", "sys.stdout.close(); sys.stderr.close()"])
def test_a_command_without_its_streams_ends_with_its_status(closing, ended):
    assert ended(CLOSED % closing, status=75) == ""
