"""Windows of time: they follow each other without a gap, and each second is in one part of one of them."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.record import pulse as pulses
from pretrain.record.pulse import Pulse


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told: clock(seconds)."""
    time = SimpleNamespace(at=100.0)
    monkeypatch.setattr(pulses, "time", SimpleNamespace(perf_counter=lambda: time.at))

    def move(seconds):
        time.at += seconds

    return move


@pytest.fixture
def pulse(clock):
    return Pulse(SimpleNamespace(beat=lambda step, part: None), torch.device("cpu"))


def waiting(clock, *seconds):
    for each in seconds:
        clock(each)
        yield each


def test_a_window_holds_each_second_once(clock, pulse):
    for _ in pulse.batches(0, waiting(clock, 2, 3)):
        clock(10)
    with pulse.paused("saving"):
        clock(4)
    with pulse.paused("evaluating"):
        clock(6)
    with pulse.paused("saving"):
        clock(1)
    window = pulse.window()
    assert window.times() == {"time/training": 20, "time/waiting": 5, "time/saving": 5, "time/evaluating": 6}
    assert (window.seconds, window.waited) == (25, 5)
    clock(7)
    assert pulse.window().times() == {"time/training": 7, "time/waiting": 0}


def test_the_worst_ranks_waiting_is_told_and_never_more_than_there_was(clock, pulse):
    for _ in pulse.batches(0, waiting(clock, 2)):
        clock(10)
    with pulse.paused("saving"):
        clock(5)
    window = pulse.window()
    assert window.times(9.0) == {"time/training": 3, "time/waiting": 9, "time/saving": 5}
    assert window.times(13.0) == {"time/training": 0, "time/waiting": 12, "time/saving": 5}, "ranks' clocks differ"


def test_what_an_evaluations_line_tells_is_in_no_window(clock, pulse):
    clock(10)
    with pulse.paused("evaluating"):
        clock(6)
    assert pulse.pauses() == {"time/evaluating": 6}
    clock(3)
    with pulse.paused("saving"):
        clock(2)
    assert pulse.window().times() == {"time/training": 13, "time/waiting": 0, "time/saving": 2}


def test_what_fails_has_taken_its_time_too(clock, pulse):
    def fail(seconds):
        clock(seconds)
        raise OSError("no answer")
        yield

    def evaluate():
        with pulse.paused("evaluating"):
            next(fail(2))

    for failing in (lambda: next(pulse.batches(0, fail(3))), evaluate):
        with pytest.raises(OSError, match="no answer"):
            failing()
    assert pulse.window(wait=False).times() == {"time/training": 0, "time/waiting": 3, "time/evaluating": 2}
