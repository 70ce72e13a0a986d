"""Losses across a resume: those of steps that were trained twice, or else the jump between the lines around it."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pretrain.history.history import Line, RunHistory
from pretrain.history.proof.finding import UNKNOWN, Faults, Finding, counted
from pretrain.history.proof.span import Span, loops

CONTINUOUS = "the losses continue at each resume"

# Of a step that was trained twice: the relative difference of its losses that rounding explains, within so many steps
# after the resume. It grows from step to step; beyond them the lines are judged as those around a jump. Measured on a
# CPU over changes of ranks and micro-batch: up to 2e-7 in float32, 8e-4 in bfloat16. An accelerator whose kernels do
# not repeat themselves, other threads or other kernels may make more: a larger difference accuses nobody.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
WITHIN = 20
# The first step after a resume is the forward pass of the checkpoint's weights on the order's samples: that rounding
# makes so much of it is out of the question.
OTHER = 0.05
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

    It fails only where the first step after a resume was trained on other weights or samples than before. Other
    differences that are larger than usual are stated: whether they are of the resume cannot be known.

    Args:
        trained: the config that the newest checkpoint holds, with `precision`; None: there is none.
    """
    if not history.events:
        return Finding(CONTINUOUS, UNKNOWN, "the run is from before events.jsonl: its resumes are not recorded")
    found, faults, unknown = resumes(history), Faults(), []
    if unrecorded := next((span.begin for span in loops(history)), 0):
        unknown.append(f"resumes up to step {unrecorded} are from before events.jsonl")
    if not found or trained is None:
        return faults.finding(CONTINUOUS, "there was no other resume" if unrecorded else "there was no resume", unknown)
    tolerance, repeats = TOLERANCES[trained.get("precision", "float32")], not (_dropout(trained) or history.quarantine)
    equal, compared, worst, jumps = 0, 0, 0.0, 0
    for resume in found:
        near = _comparable(resume, trained)
        for before, after in near:
            apart = _apart(before["loss"], after["loss"])
            compared, equal, worst = compared + 1, equal + (apart == 0), max(worst, apart)
            if apart > OTHER and repeats and after["step"] == resume.span.begin + 1:
                faults.add(
                    f"{resume.name}: step {after['step']} had loss {before['loss']} before and {after['loss']} "
                    f"after; a relative difference of at most {OTHER:g} would be right"
                )
        largest = max((_apart(before["loss"], after["loss"]) for before, after in near), default=0.0)
        if largest > tolerance:
            unknown.append(
                f"{resume.name}: losses of steps trained twice differ by up to {largest:.1e}, more than the "
                f"{tolerance:g} that rounding is known to make"
            )
        if not near:
            jumps += 1
            unknown += filter(None, [_jump(resume)])
    words = counted(len(found), "resume")
    if compared:
        words += (
            f"; {counted(compared, 'line')} of steps trained twice, {equal:,} of them equal to the bit, the largest "
            f"relative difference {worst:.1e}"
        )
    if jumps:
        words += f"; at {jumps} the jump is compared with those between neighbouring lines"
    return faults.finding(CONTINUOUS, words, unknown)


def _comparable(resume: Resume, trained: Mapping[str, Any]) -> list[tuple[Line, Line]]:
    """The pairs whose losses must agree but for rounding."""
    if _dropout(trained) and resume.other:
        return []  # masks are drawn by each rank, a micro-batch at a time
    pairs = [(before, after) for before, after in resume.pairs if before.get("lr") == after.get("lr")]
    return [(before, after) for before, after in pairs if after["step"] <= resume.span.begin + WITHIN]


def _dropout(trained: Mapping[str, Any]) -> bool:
    model = trained.get("model", {})
    return bool(model.get("dropout") or model.get("drop_path"))


def _apart(one: float | None, other: float | None) -> float:
    """The relative difference of two losses; 0 of two that are no numbers."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return abs(one - other) / max(abs(one), abs(other), 1e-12)


def _jump(resume: Resume) -> str:
    """What is unusual about the jump at a resume, or that too few lines tell; empty for nothing."""
    before, after = _losses(resume.lead), _losses(resume.lines)
    apart = _differences(before) + _differences(after)
    if not before or not after or len(apart) < ENOUGH:
        return f"at step {resume.span.begin} too few lines tell"
    middle = statistics.median(apart)
    limit = middle + DEVIATIONS * 1.4826 * statistics.median(abs(one - middle) for one in apart)
    if abs(after[0] - before[-1]) <= limit:
        return ""
    return (
        f"{resume.name}: the loss goes from {before[-1]:.6g} (step {resume.lead[-1]['step']}) to {after[0]:.6g} (step "
        f"{resume.lines[0]['step']}); neighbouring lines differ by up to {limit:.3g}"
    )


def _losses(lines: Sequence[Line]) -> list[float]:
    return [line["loss"] for line in lines if line["loss"] is not None]


def _differences(losses: Sequence[float]) -> list[float]:
    return [abs(after - before) for before, after in pairwise(losses)]
