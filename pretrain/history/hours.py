"""Where the time of a run went: for each attempt, and in the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pretrain.history.history import Attempt, Line, RunHistory

# In the order in which they are shown; docs/runs.md says what each of them is.
PARTS = ("training", "waiting", "saving", "evaluating", "starting", "closing", "lost", "unknown", "other")
_STATED = ("training", "waiting", "saving", "evaluating")  # as time/… of metrics lines and events
_OFF = 0.01  # share of an attempt that the parts may leave
_LEAST = 0.1  # seconds that are worth a word


@dataclass(frozen=True)
class Row:
    """A part of the time.

    Args:
        part: one of `PARTS`.
        seconds: of wall clock.
        share: of all parts, in [0, 1].
        gpu_hours: hours times ranks; of a run on CPUs, rank-hours.
    """

    part: str
    seconds: float
    share: float
    gpu_hours: float


@dataclass(frozen=True)
class AttemptHours:
    """The time of one attempt, from the start of rank 0's process to its last record.

    Args:
        seconds: by part; their sum is the wall clock.
    """

    attempt: Attempt
    seconds: dict[str, float]

    @property
    def ranks(self) -> int:
        """How many processes it had, a device each."""
        return int(self.attempt.start["ranks"])

    @property
    def wall(self) -> float:
        """Its wall clock, in seconds."""
        return self.attempt.last - self.attempt.began

    @property
    def rows(self) -> tuple[Row, ...]:
        """Its parts, in the order of `PARTS`."""
        return _rows([self])


@dataclass(frozen=True)
class Hours:
    """The time of a run.

    Args:
        attempts: in their order; empty where no events were recorded.
        between: seconds between attempts: queued, down, or failing before they were recorded.
        notes: what is not known or does not add up, a sentence each.
    """

    attempts: tuple[AttemptHours, ...]
    between: float
    notes: tuple[str, ...]

    @property
    def wall(self) -> float:
        """The wall clock of all attempts, in seconds; what is `between` them is not in it."""
        return sum(attempt.wall for attempt in self.attempts)

    @property
    def gpu_hours(self) -> float:
        """Hours times ranks, of all attempts."""
        return sum(attempt.wall * attempt.ranks for attempt in self.attempts) / 3600

    @property
    def rows(self) -> tuple[Row, ...]:
        """The parts over all attempts, in the order of `PARTS`; empty where no events were recorded."""
        return _rows(self.attempts)


def hours(history: RunHistory) -> Hours:
    """Add up the time of a run, from what its folder tells; the run may be going on."""
    attempts = history.attempts
    told = [_of_attempt(attempt, _resumes(attempts)) for attempt in attempts]
    between = [later.began - earlier.last for earlier, later in pairwise(attempts)]
    return Hours(tuple(told), sum(max(gap, 0.0) for gap in between), tuple(_notes(history, told, between)))


def _rows(attempts: Sequence[AttemptHours]) -> tuple[Row, ...]:
    if not attempts:
        return ()
    wall = sum(attempt.wall for attempt in attempts)
    found = []
    for part in PARTS:
        seconds = sum(attempt.seconds[part] for attempt in attempts)
        devices = sum(attempt.seconds[part] * attempt.ranks for attempt in attempts)
        found.append(Row(part, seconds, seconds / wall if wall else 0.0, devices / 3600))
    return tuple(found)


def _resumes(attempts: Sequence[Attempt]) -> list[tuple[float, int]]:
    """When training went on from a checkpoint (or from the beginning), and the steps completed there."""
    events = [event for attempt in attempts for event in attempt.events]
    return [(float(event["at"]), int(event["step"])) for event in events if event["event"] in ("start", "train")]


def _of_attempt(attempt: Attempt, resumes: Sequence[tuple[float, int]]) -> AttemptHours:
    spent = dict.fromkeys(PARTS, 0.0)
    edge, doing = attempt.began, "starting"  # what is accounted for, and what comes after
    loop: Line | None = None
    for event in attempt.events:
        at = float(event["at"])
        if event["event"] == "train":
            spent["starting"] += at - edge
            loop, edge, doing = event, at, "unknown"
        elif event["event"] == "left" and loop is not None:
            spent["other"] += at - edge - _add_loop(spent, loop, event, attempt, resumes)
            loop, edge, doing = None, at, "closing"
        elif event["event"] == "rollback":
            doing = "starting"
    if loop is not None:  # it was killed, or is going on
        spent["unknown"] -= _add_loop(spent, loop, None, attempt, resumes)
    spent[doing] += attempt.last - edge
    return AttemptHours(attempt, {part: round(seconds, 3) + 0.0 for part, seconds in spent.items()})  # 0.0 of -0.0


def _add_loop(
    spent: dict[str, float],
    train: Line,
    left: Line | None,
    attempt: Attempt,
    resumes: Sequence[tuple[float, int]],
) -> float:
    """Add what the lines of a loop, and its end if it has `left`, state; the sum of it in seconds.

    Steps that were trained again later are lost, and evaluations of them. Of a line that is of some such steps and some
    others, it is their share. Saves stay saves: the first one after a line is the checkpoint to go back to.
    """
    begin, end = float(train["at"]), float(left["at"]) if left else float("inf")
    stating = [line for line in attempt.lines if begin <= float(line["at"]) <= end]
    before, total = int(train["step"]), 0.0
    for line in [*stating, left] if left else stating:
        times = {part: float(line.get(f"time/{part}", 0.0)) for part in _STATED}
        total += sum(times.values())
        step = int(line["step"])
        again = min((done for at, done in resumes if at > float(line["at"])), default=step)
        repeated = step - max(before, again)  # of the steps since the line before
        share = min(max(repeated / (step - before), 0.0), 1.0) if step > before else float(before > again)
        if "time/training" in line:
            before = step
        for part, seconds in times.items():
            lost = {"saving": 0.0, "evaluating": float(step > again)}.get(part, share) * seconds
            spent[part] += seconds - lost
            spent["lost"] += lost
    return total


def _notes(history: RunHistory, told: Sequence[AttemptHours], between: Sequence[float]) -> list[str]:
    if not told:
        return ["when the run was trained, no events were recorded: where its time went is not known"]
    notes = []
    if first := int(told[0].attempt.start["step"]):
        notes.append(f"the first {first:,} steps were trained before events were recorded; their time is not in here")
    for number, each in enumerate(told, start=1):
        if each.attempt.end is None:
            going_on = number == len(told) and history.under_way
            ended = "is under way" if going_on else "was killed"
            notes.append(f"attempt {number} {ended}: what it did after its last record is not known, and not in here")
        if backward := [part for part in PARTS if each.seconds[part] < -_LEAST]:
            notes.append(
                f"attempt {number}: {' and '.join(backward)} is less than nothing; the clock was set back meanwhile"
            )
        elif each.seconds["other"] > max(_OFF * each.wall, _LEAST):
            notes.append(f"attempt {number}: the parts leave {each.seconds['other']:.1f} s of {each.wall:.1f} s")
    for number, gap in enumerate(between, start=2):
        if gap < 0:
            notes.append(
                f"attempt {number} began {-gap:.1f} s before the last record of the one before: it waited for that "
                "one to end, or their clocks differ"
            )
    return notes
