"""Losses across a resume: those of steps that were trained twice, or else the jump between the lines around it."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pretrain.history.history import Line, RunHistory
from pretrain.history.proof.finding import HOLDS, UNKNOWN, Faults, Finding, counted
from pretrain.history.proof.span import Span, loops

CONTINUOUS = "the losses continue at each resume"

# Of a step that was trained twice, on another layout: the largest relative difference of its losses, within so many
# steps after the resume. Rounding grows from step to step; beyond them the lines are judged as those around a jump.
# Measured on a CPU over changes of ranks and micro-batch: up to 2e-7 in float32, 8e-4 in bfloat16.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
WITHIN = 20
# A jump is as usual where it is at most the median of the differences between neighbouring lines and so many of their
# deviations (1.4826 × median absolute deviation), of up to so many lines on either side, at least so many in all.
DEVIATIONS, NEIGHBOURS, ENOUGH = 8.0, 25, 8
_LAYOUT = ("ranks", "micro_batch", "zero_stage", "device", "torch")


@dataclass
class Resume:
    """One resume: what was trained before it, and what after.

    Args:
        span: the loop that it began.
        other: which parts of the layout differ from the start before.
        pairs: lines of the same step, before and after.
        lead: the last lines before its step; the last one is the last before the resume.
        lines: those after.
    """

    span: Span
    other: tuple[str, ...]
    pairs: list[tuple[Line, Line]] = field(default_factory=list)
    lead: list[Line] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As findings name it."""
        start = self.span.start
        layout = f"{start['ranks']} ranks, ZeRO {start['zero_stage']}, micro-batch {start['micro_batch']}"
        return f"resume at step {self.span.begin} ({layout}; {'other' if self.other else 'same'} layout)"


def resumes(history: RunHistory) -> list[Resume]:
    """Every resume that trained, in the order of time."""
    found: list[Resume] = []
    spans = list(loops(history))
    written = sorted(
        (line for line in (*history.lines, *history.discarded) if "loss" in line and "at" in line),
        key=lambda line: float(line["at"]),
    )
    times = [float(line["at"]) for line in written]
    known: dict[int, Line] = {}  # the last line of each step up to now
    for number, span in enumerate(spans):
        until = bisect_left(times, spans[number + 1].at) if number + 1 < len(spans) else len(times)
        lines = written[bisect_left(times, span.at) : until]
        before = spans[number - 1].start if number else {}
        if span.back:  # what follows a return to a checkpoint is trained otherwise, as it should be
            known = {step: line for step, line in known.items() if step <= span.begin}
        elif number and span.begin and lines:
            resume = Resume(span, tuple(name for name in _LAYOUT if span.start.get(name) != before.get(name)))
            resume.pairs = [(known[line["step"]], line) for line in lines if line["step"] in known]
            resume.lead = [known[step] for step in sorted(known) if step <= span.begin][-NEIGHBOURS:]
            resume.lines = lines[:NEIGHBOURS]
            found.append(resume)
        known |= {line["step"]: line for line in lines}
    return found


def continuity(history: RunHistory, trained: Mapping[str, Any] | None) -> Finding:
    """Whether the losses continue at each resume.

    Args:
        trained: the config that the newest checkpoint holds, with `precision`; None: there is none.
    """
    if not history.events:
        return Finding(CONTINUOUS, UNKNOWN, "the run is from before events.jsonl: its resumes are not recorded")
    found = resumes(history)
    if not found or trained is None:
        return Finding(CONTINUOUS, HOLDS, "there was no resume")
    faults, unknown, equal, compared, worst, jumps = Faults(), [], 0, 0, 0.0, 0
    for resume in found:
        exact = _exact(resume, trained)
        tolerance = 0.0 if exact else TOLERANCES[trained.get("precision", "float32")]
        near = _comparable(resume, trained, exact)
        for before, after in near:
            apart = _apart(before["loss"], after["loss"])
            compared, equal, worst = compared + 1, equal + (apart == 0), max(worst, apart)
            if apart > tolerance:
                limit = "the same bits" if exact else f"a relative difference of at most {tolerance:g}"
                faults.add(
                    f"{resume.name}: step {after['step']} had loss {before['loss']} before and {after['loss']} "
                    f"after; {limit} would be right"
                )
        if not near:
            jumps += 1
            fault = _jump(resume)
            if fault is None:
                unknown.append(f"at step {resume.span.begin} too few lines tell")
            elif fault:
                faults.add(f"{resume.name}: {fault}")
    words = counted(len(found), "resume")
    if compared:
        words += (
            f"; {counted(compared, 'line')} of steps trained twice, {equal:,} of them equal to the bit, the largest "
            f"relative difference {worst:.1e}"
        )
    if jumps:
        words += f"; at {jumps} the jump is compared with those between neighbouring lines"
    return faults.finding(CONTINUOUS, words, unknown)


def _exact(resume: Resume, trained: Mapping[str, Any]) -> bool:
    """Whether the losses must have the same bits: the same layout, and arithmetic that repeats itself."""
    same = not resume.other
    return same and (resume.span.start["device"] == "cpu" or bool(trained["train"].get("deterministic")))


def _comparable(resume: Resume, trained: Mapping[str, Any], exact: bool) -> list[tuple[Line, Line]]:
    """The pairs whose losses must agree."""
    pairs = [(before, after) for before, after in resume.pairs if before.get("lr") == after.get("lr")]
    if exact:
        return pairs
    if _dropout(trained) and "ranks" in resume.other:
        return []  # masks are drawn by each rank
    return [(before, after) for before, after in pairs if after["step"] <= resume.span.begin + WITHIN]


def _dropout(trained: Mapping[str, Any]) -> bool:
    model = trained.get("model", {})
    return bool(model.get("dropout") or model.get("drop_path"))


def _apart(one: float | None, other: float | None) -> float:
    """The relative difference of two losses; 0 of two that are no numbers."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return abs(one - other) / max(abs(one), abs(other), 1e-12)


def _jump(resume: Resume) -> str | None:
    """What is wrong with the jump at a resume; empty for nothing, None where too few lines tell."""
    before, after = _losses(resume.lead), _losses(resume.lines)
    apart = _differences(before) + _differences(after)
    if not before or not after or len(apart) < ENOUGH:
        return None
    middle = statistics.median(apart)
    limit = middle + DEVIATIONS * 1.4826 * statistics.median(abs(one - middle) for one in apart)
    jump = abs(after[0] - before[-1])
    if jump <= limit:
        return ""
    return (
        f"the loss goes from {before[-1]:.6g} (step {resume.lead[-1]['step']}) to {after[0]:.6g} (step "
        f"{resume.lines[0]['step']}); as neighbouring lines differ, at most {limit:.3g} would be right"
    )


def _losses(lines: Sequence[Line]) -> list[float]:
    return [line["loss"] for line in lines if line["loss"] is not None]


def _differences(losses: Sequence[float]) -> list[float]:
    return [abs(after - before) for before, after in pairwise(losses)]
