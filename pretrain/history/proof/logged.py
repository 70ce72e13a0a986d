"""The lines of metrics.jsonl: each where it should be, of the values that can be computed, and as it was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.checkpoint.step import Checkpoint
from pretrain.engine.schedule import Schedule, ScheduleSection
from pretrain.history.history import Line, RunHistory
from pretrain.history.proof.finding import FAILS, UNKNOWN, Faults, Finding, counted
from pretrain.history.proof.span import Span, start_of
from pretrain.record.folder import METRICS
from pretrain.record.lines import first_check, next_check, split_check
from pretrain.stream.order import Order

LINES = "metrics.jsonl has a line of each step that was to be logged, in order"
VALUES = "its images, epochs and learning rates are those of the steps"
CHAIN = "its lines are as they were written"


class Logged:
    """Checks the lines of training steps."""

    def __init__(
        self, history: RunHistory, metrics: Sequence[Line], order: Order | None, spans: Sequence[Span]
    ) -> None:
        """
        Args:
            metrics: the lines of metrics.jsonl, of training and of evaluations, as they stand there.
            spans: what stands of the run's loops; empty where no events tell.
        """
        self._history, self._metrics, self._order, self._spans = history, metrics, order, spans
        self._trained = [line for line in metrics if "loss" in line]
        self._number = {id(line): number for number, line in enumerate(metrics, start=1)}

    def where(self, line: Line) -> str:
        """A line of metrics.jsonl, in words."""
        return f"{METRICS}, line {self._number[id(line)]} (step {line['step']})"

    def lines(self, completed: int) -> Finding:
        """Whether there is a line where one is due. `completed`: steps that checkpoints or
        events say were completed."""
        faults, last = Faults(), 0
        for line in self._metrics:
            step = line["step"]
            if step < last or (step == last and "loss" in line):
                faults.add(f"{self.where(line)} follows step {last}; ascending steps would be right")
            last = max(last, step)
        there = {line["step"]: line for line in self._trained}
        end = max([completed, *there])
        finals = {event["step"] for event in self._history.events if event["event"] == "finished"}
        for step in range(1, end + 1):
            start = start_of(self._spans, step - 1)
            every = start.get("logging_every", self._history.config["logging"]["every"])
            final = step == start.get("steps", self._history.config["train"]["steps"]) or step in finals
            if step % every == 0 and step not in there:
                faults.add(f"{METRICS}: no line of step {step}; logging.every was {every}")
            elif step in there and step % every and not final:
                faults.add(f"{self.where(there[step])}: logging.every was {every}, so no line would be right")
        evaluations = counted(len(self._metrics) - len(self._trained), "evaluation")
        words = f"{counted(len(self._trained), 'line')} up to step {end:,}, {evaluations}"
        if faults.count and not self._told("logging_every"):
            why = "the steps fit no single logging.every, and what it was at each start was not recorded"
            return Finding(LINES, UNKNOWN, why, faults.texts)
        return faults.finding(LINES, words)

    def values(self) -> Finding:
        """Whether what follows from the step is right in each line."""
        if self._order is None:
            return Finding(VALUES, UNKNOWN, "samples and batch of the run are not known")
        faults, batch, samples = Faults(), self._order.global_batch, self._order.samples
        rates: dict[int, Schedule] = {}
        other = 0  # learning rates that only an extension explains
        for line in self._trained:
            step, start = line["step"], start_of(self._spans, line["step"] - 1)
            schedule = rates.setdefault(id(start) if "schedule" in start else 0, self._schedule(start))
            for name, right in (("images", step * batch), ("epoch", step * batch / samples)):
                if line.get(name) != right:
                    faults.add(f"{self.where(line)}: {name} is {line.get(name)}, {right} would be right")
            if (right := schedule(step - 1)) != line.get("lr"):
                if "schedule" in start:
                    faults.add(f"{self.where(line)}: lr is {line.get('lr')}, {right} would be right")
                else:
                    other += 1
        why = (
            f"{other:,} learning rates are not those of the schedule in config.json, and earlier ones are not recorded"
        )
        return faults.finding(VALUES, counted(len(self._trained), "line"), [why] if other else [])

    def _schedule(self, start: Mapping[str, Any]) -> Schedule:
        """The schedule that a start trained by; of one that does not tell, as config.json has it."""
        config = self._history.config
        section, lr = start.get("schedule", config["schedule"]), start.get("lr", config["optimizer"]["lr"])
        return Schedule(ScheduleSection(**section), lr, start.get("steps", config["train"]["steps"]))

    def _told(self, name: str) -> bool:
        """Whether every start whose steps stand tells this; of a run from before events, the first steps have none."""
        return bool(self._spans) and self._spans[0].begin == 0 and all(name in span.start for span in self._spans)


def chain(metrics: Sequence[Line], raw: bytes, sealed: Sequence[Checkpoint]) -> Finding:
    """Whether the lines of metrics.jsonl are as they were written.

    Each line's check is of the line and of the check before it, so a line shows that was changed, added, moved or
    removed. Who computes all checks anew is found by the one that a checkpoint holds. There is no signature: who
    rewrites the checkpoints too is not found.

    Args:
        metrics: the lines of the file.
        raw: the file.
        sealed: the checkpoints.
    """
    faults, digest = Faults(), hashlib.sha256()
    before, old, last, checked = first_check(b""), 0, 0, 0
    steps = [line["step"] if "loss" in line else 0 for line in metrics]
    places = {before: 0}  # how many lines there are at each running check
    for number, (line, text) in enumerate(zip(metrics, raw.split(b"\n")[:-1], strict=True), start=1):
        digest.update(text + b"\n")
        body, check = split_check(text.decode())
        where = f"{METRICS}, line {number} (step {line['step']})"
        if check and check != next_check(before, body):
            faults.add(f"{where}: was changed after it was written, or what stood between it and step {last} was")
        elif not check and checked:
            faults.add(f"{where}: carries no check, and the lines before it do; it was changed or added")
        checked, old = checked + bool(check), old + (not check)
        before, last = check or digest.hexdigest()[:16], line["step"]
        places[before] = number
    seals = 0
    for saved in sorted(sealed, key=lambda saved: saved.step):
        if not saved.state.get("metrics"):
            continue
        seals += 1
        at = places.get(saved.state["metrics"])
        if at is None or any(s > saved.step for s in steps[:at]) or any(0 < s <= saved.step for s in steps[at:]):
            faults.add(
                f"{METRICS}, up to step {saved.step}: not the lines that were there when {saved.path.name} was saved; "
                "lines were removed or written anew"
            )
    if faults.count:
        return Finding(CHAIN, FAILS, f"{counted(checked, 'line')}, {counted(seals, 'checkpoint')}", faults.texts)
    if not checked and not seals:
        why = "its lines carry no checks: the run is from before there were any" if old else "it has no lines"
        return Finding(CHAIN, UNKNOWN, why)
    words = f"{counted(checked, 'line')}, {counted(seals, 'checkpoint')} with their check"
    if old:
        words += f"; {old:,} lines before them carry none: they are as when the first one was written"
    return faults.finding(CHAIN, words)
