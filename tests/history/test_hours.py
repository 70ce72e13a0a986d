"""Where the time of a run went: every second of every attempt in one part, by hand and against an outer clock."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.history.history import RunHistory
from pretrain.history.hours import PARTS, Hours, hours
from pretrain.record.folder import RunFolder
from tests.conftest import ROOT, lines

PRETRAIN = "launch/pretrain.py"


def told(events, trained=(), discarded=()) -> Hours:
    """Of a run with these events and lines, each (at, name or step, step, …); without a loss a line is an evaluation's.

    Its folder is none, so that nobody holds it.
    """
    of_steps = tuple(line for line in trained if "loss" in line)
    evaluations = tuple(line for line in trained if "loss" not in line)
    return hours(RunHistory(RunFolder(Path("none")), {}, of_steps, evaluations, tuple(discarded), tuple(events), ()))


def event(at, name, step, **besides):
    return {"at": at, "event": name, "step": step, **besides}


def line(at, step, *, training=0.0, waiting=0.0, saving=0.0):
    times = {"time/training": training, "time/waiting": waiting, "time/saving": saving}
    return {"at": at, "step": step, "loss": 1.0, **times}


def evaluation(at, step, seconds):
    return {"at": at, "step": step, "eval/top1": 0.5, "time/saving": 0.0, "time/evaluating": seconds}


def left(at, step, *, training=0.0, waiting=0.0, saving=0.0):
    return event(at, "left", step, **{k: v for k, v in line(at, step, training=training, waiting=waiting,
                                                            saving=saving).items() if "time/" in k})  # fmt: skip


def parts(of) -> dict[str, float]:
    """Those that are not 0."""
    return {row.part: row.seconds for row in of.rows if row.seconds}


def of_nothing_else(found: Hours) -> None:
    """Each second is in one part."""
    for attempt in found.attempts:
        assert sum(attempt.seconds.values()) == pytest.approx(attempt.wall)
    assert sum(row.share for row in found.rows) == pytest.approx(1.0)
    assert sum(row.gpu_hours for row in found.rows) == pytest.approx(found.gpu_hours)


def test_a_run_that_was_killed_and_resumed_on_more_ranks():
    found = told(
        [
            event(1007, "start", 0, began=1000, ranks=2), event(1010, "train", 0),
            event(1062, "saved", 20, seconds=3),
            # Killed. The next one waits in a queue for 900 s.
            event(2008, "start", 20, began=1972, ranks=8), event(2022, "train", 20),
            left(2050, 50, saving=4), event(2053, "finished", 50),
        ],
        [
            line(1030, 10, training=15, waiting=5),
            line(1055, 20, training=20, waiting=5),
            evaluation(1064, 20, 6),  # the checkpoint that was resumed from: it stands
            line(2040, 40, training=18), line(2046, 50, training=6),
        ],
        [line(1070, 24, training=5, waiting=1, saving=3)],
    )  # fmt: skip
    first, second = found.attempts
    assert parts(first) == {
        "training": 35, "waiting": 10, "saving": 3, "evaluating": 6, "starting": 10, "lost": 6,
    }  # fmt: skip
    assert parts(second) == {"training": 24, "saving": 4, "starting": 50, "closing": 3}
    assert found.wall == (1070 - 1000) + (2053 - 1972)
    assert found.between == 1972 - 1070
    assert found.gpu_hours == pytest.approx((70 * 2 + 81 * 8) / 3600)
    rows = {row.part: row for row in found.rows}
    assert list(rows) == list(PARTS)
    assert rows["training"].gpu_hours == pytest.approx((35 * 2 + 24 * 8) / 3600)
    assert rows["lost"].share == pytest.approx(6 / 151)
    assert found.notes == (
        "attempt 1 was killed: what it did after its last record is not known, and not in here",
    )  # fmt: skip
    of_nothing_else(found)


def test_of_a_line_that_is_of_steps_before_the_checkpoint_and_after_it_a_share_is_lost():
    events = [
        event(100, "start", 0, began=100, ranks=1), event(100, "train", 0),
        event(200, "start", 15, began=200, ranks=1), event(200, "train", 15),
    ]  # fmt: skip
    before, after = line(110, 10, training=10), line(130, 20, training=16, waiting=4)
    found = told(events, [before], [after, evaluation(135, 20, 5), line(145, 30, training=10)])
    assert parts(found.attempts[0]) == {"training": 18, "waiting": 2, "lost": 25}
    of_nothing_else(found)


def test_what_was_trained_before_a_roll_back_is_lost_once():
    found = told(
        [
            event(100, "start", 0, began=90, ranks=4), event(100, "train", 0),
            left(142, 11, training=1, saving=1), event(142, "rollback", 8, reason="the loss is nan"),
            event(150, "train", 5),
            left(180, 12, saving=3), event(181, "finished", 12),
        ],
        [line(120, 5, training=20), line(177, 12, training=27)],
        [line(140, 11, training=18, waiting=2)],
    )  # fmt: skip
    assert parts(found) == {"training": 47, "saving": 4, "starting": 18, "closing": 1, "lost": 21}
    of_nothing_else(found)


def test_steps_that_are_lost_twice_count_each_time():
    """Killed at step 8 with a checkpoint of 5, then that one is damaged and the run begins anew."""
    found = told(
        [
            event(100, "start", 0, began=100, ranks=1), event(100, "train", 0),
            event(200, "start", 5, began=200, ranks=1), event(200, "train", 5),
            event(300, "start", 0, began=300, ranks=1), event(300, "train", 0),
            left(320, 10), event(320, "finished", 10),
        ],
        [line(320, 10, training=20)],
        [line(108, 8, training=8), line(205, 10, training=5)],
    )  # fmt: skip
    assert [parts(attempt) for attempt in found.attempts] == [{"lost": 8}, {"lost": 5}, {"training": 20}]


def test_a_start_that_never_trained_was_starting():
    failed = [event(110, "start", 0, began=100, ranks=1), event(112, "failed", 0, reason="InputError: no room")]
    killed = [event(130, "start", 0, began=120, ranks=1)]
    found = told([*failed, *killed])
    assert [parts(attempt) for attempt in found.attempts] == [{"starting": 12}, {"starting": 10}]
    assert [note.split(":")[0] for note in found.notes] == ["attempt 2 was killed"]


def test_what_a_killed_attempt_did_since_its_last_line_is_not_known():
    started = event(100, "start", 0, began=100, ranks=1), event(100, "train", 0)
    found = told([*started, event(125, "saved", 12, seconds=2)], [line(120, 10, training=20)])
    assert parts(found) == {"training": 20, "unknown": 5}


def test_what_the_parts_leave_is_told_and_more_than_a_hundredth_is_noted():
    begun = event(100, "start", 0, began=100, ranks=1), event(100, "train", 0)
    for training, noted in ((99.5, ()), (98, ("attempt 1: the parts leave 2.0 s of 100.0 s",))):
        found = told([*begun, left(200, 10), event(200, "finished", 10)], [line(190, 10, training=training)])
        assert parts(found) == {"training": training, "other": 100 - training}
        assert found.notes == noted


def test_of_a_run_without_events_nothing_is_invented():
    found = told([], [{"step": 10, "loss": 1.0, "images_per_second": 100.0}])
    assert (found.rows, found.wall, found.gpu_hours) == ((), 0, 0)
    assert found.notes == ("when the run was trained, no events were recorded: where its time went is not known",)


def test_of_a_run_whose_first_steps_had_no_events_those_are_left_out_and_it_is_said():
    events = [
        event(100, "start", 1000, began=90, ranks=1), event(101, "train", 1000),
        left(111, 1010), event(111, "finished", 1010),
    ]  # fmt: skip
    found = told(events, [{"step": 1000, "loss": 2.0}, line(111, 1010, training=10)])
    assert parts(found) == {"training": 10, "starting": 11}
    assert found.notes == (
        "the first 1,000 steps were trained before events were recorded; their time is not in here",
    )  # fmt: skip


def test_a_start_that_waited_for_the_one_before_is_no_time_between_them_and_a_clock_set_back_is_noted():
    first = event(100, "start", 0, began=100, ranks=1), event(100, "train", 0)
    stopped = left(110, 10), event(110, "stopped", 10, reason="SIGTERM")
    second = event(112, "start", 10, began=105, ranks=1), event(112, "train", 10)
    found = told([*first, *stopped, *second, left(112, 10), event(112, "finished", 10)], [line(110, 10, training=10)])
    assert found.between == 0
    assert found.notes == (
        "attempt 2 began 5.0 s before the last record of the one before: it waited for that one to end, or their "
        "clocks differ",
    )
    set_back = told([*first, left(60, 10), event(60, "finished", 10)])
    assert set_back.notes == ("attempt 1: other is less than nothing; the clock was set back meanwhile",)


# In rank 0's process: its own clock, from its first line to its last record, is a part of the attempt.
INNER = """
import os, pathlib, time
began = time.time()
from pretrain.checkpoint import pieces
from pretrain.record.events import Events
from pretrain.record.ledger import Ledger
step, add, write_share = Ledger.step, Events.add, pieces.write_share
trained = [0]
def note_end():
    if int(os.environ.get("RANK", 0)) == 0:
        pathlib.Path("INNER").write_text(str(time.time() - began))
def step_then(self, number, *rest):
    step(self, number, *rest)
    trained[0] = number + 1
    ACTION
def add_then(self, event, *rest, **besides):
    add(self, event, *rest, **besides)
    if event in ("finished", "stopped"):
        note_end()
def write_slowly(*given):
    while 10 <= trained[0] < 14:  # a save in the background, which the run trains on meanwhile
        time.sleep(0.001)
    return write_share(*given)
Ledger.step, Events.add, pieces.write_share = step_then, add_then, write_slowly
"""
STOP = 'if number == 15: pathlib.Path("FILE").touch()'
WAITING = "checkpoint.background=false"
KILL = "if number == 28: note_end(); os.kill(os.getpid(), 9)"


@pytest.fixture(scope="module")
def interrupted(digits, tiny_config, run, tmp_path_factory):
    """A run with saves and evaluations: stopped, killed, resumed on two ranks. And what outer and inner clocks say."""
    folder = tmp_path_factory.mktemp("hours")
    out, inner = folder / "run", folder / "inner"
    config = tiny_config(
        folder / "tiny.json",
        data={"eval": str(digits / "test")},
        train={"steps": 40, "eval_every": 10},
        checkpoint={"every": 10},
        logging={"every": 4},
    )
    clocks = []
    words = "--config", config, "--out", out
    # In the second one a save is whole before the next step, so that the kill finds it.
    for action, ranks, status, more in ((STOP, 1, 75, ()), (KILL, 1, -9, (WAITING,)), ("pass", 2, 0, ())):
        prelude = INNER.replace("INNER", str(inner)).replace("ACTION", action.replace("FILE", str(out / "STOP")))
        began = time.time()
        done = run(PRETRAIN, *words, *more, ranks=ranks, prelude=prelude)
        assert done.returncode == status, done.stdout + done.stderr
        clocks.append((float(inner.read_text()), time.time() - began))
    return out, clocks


def test_the_parts_of_a_stopped_killed_and_resumed_run_add_up_to_what_outer_clocks_saw(interrupted):
    out, clocks = interrupted
    found = hours(RunHistory.read(out))
    assert [attempt.ranks for attempt in found.attempts] == [1, 1, 2]
    of_nothing_else(found)
    for attempt, (inner, outer) in zip(found.attempts, clocks, strict=True):
        assert attempt.wall <= outer + 0.02, "it began to 10 ms"
        if attempt.attempt.end is not None:  # the killed one's last steps were not recorded
            assert attempt.wall >= inner - 0.02
        assert abs(attempt.seconds["other"]) <= 0.01 * attempt.wall
    assert found.wall + found.between <= sum(outer for _, outer in clocks) + 0.02


def test_each_part_is_that_of_the_lines_and_what_was_trained_again_is_lost(interrupted):
    out, _ = interrupted
    stopped, killed, last = hours(RunHistory.read(out)).attempts
    again = lines(out / "metrics.discarded.jsonl")
    assert [line["step"] for line in again] == [24, 28]
    assert [attempt.attempt.start["step"] for attempt in (stopped, killed, last)] == [0, 17, 20]
    lost = sum(line["time/training"] + line["time/waiting"] for line in again)
    assert killed.seconds["lost"] == pytest.approx(lost, abs=0.002)
    assert lost > 0
    assert stopped.seconds["lost"] == last.seconds["lost"] == 0
    for attempt in (stopped, killed, last):
        assert attempt.seconds["starting"] > 0 < attempt.seconds["evaluating"]
    told = [line for line in lines(out / "metrics.jsonl") if "eval/top1" in line]
    assert [line["step"] for line in told] == [10, 20, 30, 40]
    evaluated = sum(attempt.seconds["evaluating"] for attempt in (stopped, killed, last))
    assert evaluated == pytest.approx(sum(line["time/evaluating"] for line in told), abs=0.002)


def test_a_save_counts_for_what_training_waited_only(interrupted):
    out, _ = interrupted
    saved = next(line for line in lines(out / "events.jsonl") if line["event"] == "saved")
    evaluated, trained = (line for line in lines(out / "metrics.jsonl") if line["step"] in (10, 12))
    assert saved["step"] == 10
    assert saved["at"] > trained["at"], "steps 11 and 12 were trained while it was written"
    assert saved["seconds"] > evaluated["time/saving"] + trained["time/saving"]


@pytest.mark.long
def test_minutes_of_a_run_add_up_to_an_outer_clock_within_a_hundredth(digits, tiny_config, tmp_path):
    """Real commands, from their start to their exit: stopped by the time limit, killed, and stopped again."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    config = tiny_config(
        tmp_path / "tiny.json",
        model={"patch_size": 2, "layers": 4, "width": 96, "mlp": 192},
        data={"eval": str(digits / "test")},
        train={"steps": 10**6, "eval_every": 100},
        checkpoint={"every": 150},
        logging={"every": 10},
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> tuple[subprocess.Popen, float]:
        words = [sys.executable, PRETRAIN, "--config", config, "--out", out, *more]
        with log.open("ab") as file:
            began = time.time()
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file), began

    def trained_for(seconds: float) -> bool:
        told = lines(out / "events.jsonl")
        begun = [line["at"] for line in told if line["event"] == "train" and line["at"] > began]
        return bool(begun) and time.time() > begun[0] + seconds

    outer = []
    for minutes in (1.5, None, 1.5):
        process, began = start(f"train.time_limit_minutes={minutes}" if minutes else "train.time_limit_minutes=null")
        if minutes is None:  # killed once it has trained for three quarters of a minute
            while not trained_for(45):
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
            process.kill()
        ended = time.time()
        assert process.wait(600) == (75 if minutes else -9), log.read_text()
        outer.append((began, time.time() if minutes else ended))
    found = hours(RunHistory.read(out))
    seen = 0.0
    for attempt, (began, ended) in zip(found.attempts, outer, strict=True):
        last = attempt.attempt.last
        rows = "  ".join(f"{row.part} {row.seconds:.2f}" for row in attempt.rows if row.seconds)
        print(f"{ended - began:.2f} s by an outer clock, {attempt.wall:.2f} s in parts: {rows}")
        print(f"  {attempt.attempt.began - began:.2f} s before, {ended - last:.2f} s after the last record")
        assert began - 0.02 <= attempt.attempt.began <= last <= ended
        of_parts = sum(attempt.seconds.values())
        assert of_parts == pytest.approx(last - attempt.attempt.began, abs=0.01)
        seen += (ended if attempt.attempt.end else last) - began  # what a killed one did then is not claimed
    parts = sum(row.seconds for row in found.rows)
    print(f"in all {seen:.2f} s by an outer clock, {parts:.2f} s in parts: {1 - parts / seen:.2%} less")
    assert parts >= 0.99 * seen
