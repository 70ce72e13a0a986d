"""What happened to a run, as marks on the axis of its steps, and a table of its starts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pretrain.history.history import Attempt, Line, RunHistory
from pretrain.page.text import Table, duration_text
from pretrain.record.section import TELLING

# A lane each below the chart of the loss, from top to bottom: its name and its marker.
LANES = {
    "started": "^",
    "resumed": ">",
    "stopped": "s",
    "killed": "X",
    "failed": "P",
    "finished": "*",
    "rolled back": "<",
    "update skipped": "x",
    "not saved": "D",
    "saved": "|",
    "slow rank": ".",
    "unreadable sample": "+",
}
_OF_EVENTS = {
    "stopped": "stopped",
    "failed": "failed",
    "finished": "finished",
    "rollback": "rolled back",
    "skipped": "update skipped",
    "unsaved": "not saved",
    "saved": "saved",
}


@dataclass(frozen=True)
class Mark:
    """Something that happened after `step` completed steps. `text`: of a start, on what, where that has changed."""

    lane: str
    step: int
    text: str = ""


def marks(run: RunHistory) -> list[Mark]:
    """All of a run's marks, also of steps that a resume has taken back."""
    found = [Mark(_OF_EVENTS[event["event"]], event["step"]) for event in run.events if event["event"] in _OF_EVENTS]
    before = ""
    for number, attempt in enumerate(run.attempts):
        on = machines(attempt.start)
        found.append(
            Mark("resumed" if attempt.start["step"] else "started", attempt.start["step"], "" if on == before else on)
        )
        before = on
        if ending(run, number) == "killed":
            found.append(Mark("killed", reached(attempt)))
    if not run.events:
        found += [Mark("update skipped", step) for step in _skipped(run.lines)]
    found += [Mark("slow rank", line["step"]) for line in run.lines if (line.get("straggler/excess") or 0) > TELLING]
    found += [Mark("unreadable sample", line["step"] + 1) for line in run.quarantine]  # there, steps count from 0
    return found


def machines(start: Line) -> str:
    """On what an attempt trains: `2 ranks, ZeRO 1`, and the hosts where there are several."""
    ranks, hosts = start["ranks"], start["hosts"]
    across = f" on {hosts} hosts" if hosts > 1 else ""
    return f"{ranks} rank{'s' * (ranks > 1)}{across}, ZeRO {start['zero_stage']}"


def ending(run: RunHistory, number: int) -> str:
    """How an attempt ended: finished, stopped, failed, killed; or `going on`."""
    end = run.attempts[number].end
    if end is not None:
        return str(end["event"])
    return "going on" if number == len(run.attempts) - 1 and run.under_way else "killed"


def reached(attempt: Attempt) -> int:
    """Completed steps at the end of an attempt, as far as they are written down."""
    return max(int(line["step"]) for line in (*attempt.lines, *attempt.events))


def lost_steps(run: RunHistory) -> list[int]:
    """Of each attempt, the steps that were trained again later: after a roll-back, or by the next attempt."""
    lost: list[int] = []
    at = 0
    for attempt in run.attempts:
        lost.append(0)
        for line in sorted((*attempt.events, *attempt.lines), key=lambda line: float(line["at"])):
            event, step = line.get("event"), int(line["step"])
            if event in ("start", "train"):
                lost[-2 if event == "start" and len(lost) > 1 else -1] += max(0, at - step)
                at = step
            else:
                at = max(at, step)
    return lost


def _skipped(lines: Sequence[Line]) -> Iterator[int]:
    """Steps whose lines count more skipped updates than the lines before."""
    before = 0
    for line in lines:
        count = line.get("updates_skipped", 0)
        if count > before:
            yield line["step"]
        before = count


def starts_table(run: RunHistory, caption: str = "") -> Table:
    """A row for each attempt: when, from which step to which, on what, and how it ended."""
    rows = []
    for number, (attempt, lost) in enumerate(zip(run.attempts, lost_steps(run), strict=True)):
        start, how = attempt.start, ending(run, number)
        reason = (attempt.end or {}).get("reason")
        rows.append(
            [
                str(number + 1),
                time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(attempt.began)),
                f"{how}: {reason}" if reason else how,
                f"{start['step']:,}",
                f"{reached(attempt):,}",
                f"{lost:,}",
                duration_text(attempt.last - attempt.began),
                f"{start['ranks']} × {start['device']}",
                str(start["hosts"]),
                str(start["zero_stage"]),
                str(start["micro_batch"]),
            ]
        )
    header = ("attempt", "when (UTC)", "ended", "from step", "to step", "trained again", "lasted")
    return Table((*header, "ranks × device", "hosts", "ZeRO", "micro-batch"), rows, caption, names=3)
