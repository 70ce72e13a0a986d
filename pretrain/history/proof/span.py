"""Which start of a run trained a step, as its files stand in the end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pretrain.history.history import Line, RunHistory


@dataclass(frozen=True)
class Span:
    """Steps from `begin` on, counted from 0, up to the next span's.

    Args:
        begin: its first step.
        at: when its loop began, in seconds since 1970.
        start: the event of its start.
        back: whether it began with a return to an earlier checkpoint, not with a start.
    """

    begin: int
    at: float
    start: Line
    back: bool


def loops(history: RunHistory) -> Iterator[Span]:
    """Every time that the run's loop began, in the order of time."""
    for attempt in history.attempts:
        first = True
        for event in attempt.events:
            if event["event"] == "train":
                yield Span(event["step"], float(event["at"]), attempt.start, not first)
                first = False


def standing(spans: Sequence[Span]) -> list[Span]:
    """Those whose steps stand: what a loop began anew was taken from the ones before. Ascending."""
    kept: list[Span] = []
    for span in spans:
        while kept and kept[-1].begin >= span.begin:
            kept.pop()
        kept.append(span)
    return kept


def start_of(spans: Sequence[Span], step: int) -> Line:
    """The start that trained `step` (from 0), given what stands; empty where no event tells."""
    after = bisect_right(spans, step, key=lambda span: span.begin)
    return spans[after - 1].start if after else {}


def told_completed(events: Sequence[Line]) -> int:
    """Completed steps that stand, as the events tell: of the last checkpoint that was not taken back, or the end."""
    reached = 0
    for event in events:
        if event["event"] in ("start", "train"):
            reached = event["step"]
        elif event["event"] in ("saved", "finished"):
            reached = max(reached, event["step"])
        elif event["event"] == "rollback":  # where to, the next loop tells
            reached = 0
    return reached
