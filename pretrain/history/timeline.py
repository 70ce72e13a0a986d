"""When a run was running and what its time went to: a chart over the wall clock, and the ledger as a table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pretrain.history.hours import PARTS, AttemptHours, Hours
from pretrain.history.overlay import Overlay
from pretrain.page.figure import name_style
from pretrain.page.page import Chart
from pretrain.page.text import Table, duration_text, shortened

# Of each part of the time: what it is called, its colour and its hatch, which tells parts apart without the colour.
_DRAWN = {
    "training": ("training", "C0", ""),
    "waiting": ("waiting for data", "C1", "//"),
    "saving": ("saving", "C2", "\\\\"),
    "evaluating": ("evaluating", "C4", ".."),
    "starting": ("starting", "C7", "--"),
    "closing": ("closing", "C6", "||"),
    "lost": ("lost to restarts", "C3", "xx"),
    "unknown": ("not known", "C5", "++"),
    "other": ("other", "C5", "oo"),
}
_SECONDS = 0.05  # that a part takes at least, to be in the table
_LEAST = 0.002  # share of the time from which a part is drawn
_HEIGHT, _FRAME = 0.75, 1.0  # inches of a run's bars, and of what surrounds them
_LONGEST_GAP = 0.15  # of the running time: a longer pause is drawn as long
_APART = 0.09  # of the width, between two labels


@dataclass(frozen=True)
class Bar:
    """An attempt on the time axis, in seconds: where it begins and ends, and where the one before ended."""

    attempt: AttemptHours
    begin: float
    end: float
    before: float


def bars(told: Hours) -> list[Bar]:
    """One for each attempt; of the time between them, so much that the bars can still be seen."""
    longest = _LONGEST_GAP * told.wall
    found = [Bar(told.attempts[0], 0.0, told.attempts[0].wall, 0.0)]
    for earlier, later in pairwise(told.attempts):
        before = found[-1].end
        begin = before + min(max(_gap(earlier, later), 0.0), longest)
        found.append(Bar(later, begin, begin + later.wall, before))
    return found


def _gap(earlier: AttemptHours, later: AttemptHours) -> float:
    return later.attempt.began - earlier.attempt.last


def timeline_chart(overlay: Overlay) -> Chart | None:
    """Each attempt as wide as it lasted, divided by what its time went to; None where no times were recorded."""
    runs = [
        (told, label if len(overlay.runs) > 1 else "")
        for told, label in zip(overlay.hours, overlay.labels, strict=True)
        if told.attempts
    ]
    if not runs:
        return None
    parts = [
        part for part in PARTS if any(row.part == part and row.share > _LEAST for told, _ in runs for row in told.rows)
    ]

    def draw(figure: Figure) -> None:
        figure.suptitle("Each start as wide as it lasted, divided by what its time went to", x=0.01, ha="left", size=10)
        with rc_context({"hatch.linewidth": 0.6}):
            for axes, (told, label) in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
                _draw_run(axes, told, label)
            figure.legend(
                [Patch(**_style(part)) for part in parts],
                [_DRAWN[part][0] for part in parts],
                loc="outside lower left",
                ncols=len(parts),
                fontsize=8,
                frameon=False,
            )

    text = "; ".join((f"{label}: " if label else "") + _text(told) for told, label in runs)
    return Chart(f"When it was running, and what its time went to. {text}", draw, _FRAME + _HEIGHT * len(runs))


def _style(part: str) -> dict[str, Any]:
    _, colour, hatch = _DRAWN[part]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": rcParams["axes.facecolor"], "linewidth": 0.4}


def _draw_run(axes: Axes, told: Hours, label: str) -> None:
    placed = bars(told)
    end = placed[-1].end or 1.0
    ticks: list[tuple[float, str]] = []
    for number, bar in enumerate(placed):
        bottom, seconds = 0.0, {part: max(spent, 0.0) for part, spent in bar.attempt.seconds.items()}
        for part in PARTS:
            share = seconds[part] / (sum(seconds.values()) or 1.0)
            if share > _LEAST:
                axes.bar(bar.begin, share, bar.end - bar.begin, bottom, align="edge", **_style(part))
            bottom += share
        if number and (bar.begin - bar.before) > 0.05 * end:
            away = duration_text(_gap(placed[number - 1].attempt, bar.attempt))
            axes.text((bar.before + bar.begin) / 2, 0.5, f"not\nrunning\n{away}", ha="center", va="center", fontsize=7)
        if not ticks or bar.begin - ticks[-1][0] > _APART * end:
            began = time.gmtime(bar.attempt.attempt.began)
            ticks.append((bar.begin, time.strftime("%d %b %H:%M" if not ticks or _days(placed) else "%H:%M", began)))
    axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=7, ha="left")
    axes.set_yticks([])
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if label:
        axes.set_ylabel(shortened(label, 16), rotation=0, ha="right", va="center", fontsize=8, **name_style())


def _days(placed: list[Bar]) -> bool:
    """Whether the bars begin on several days."""
    return len({time.gmtime(bar.attempt.attempt.began)[:3] for bar in placed}) > 1


def _text(told: Hours) -> str:
    parts = [f"{_DRAWN[row.part][0]} {row.share:.1%}" for row in told.rows if row.share > _LEAST]
    count = len(told.attempts)
    return f"{count} start{'s' * (count > 1)}, running for {duration_text(told.wall)}: {', '.join(parts)}"


def ledger_table(told: Hours, caption: str = "") -> Table:
    """A row for each part of the time, and their sum."""
    shown = [row for row in told.rows if abs(row.seconds) >= _SECONDS]
    rows = [
        [
            _DRAWN[row.part][0],
            f"{row.seconds:,.1f}",
            duration_text(row.seconds),
            f"{row.share:.1%}",
            _hours(row.gpu_hours),
        ]
        for row in shown
    ]
    rows.append(["in all", f"{told.wall:,.1f}", duration_text(told.wall), "100.0%", _hours(told.gpu_hours)])
    return Table(["what the time went to", "seconds", "time", "share", device_hours(told)], rows, caption)


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 10 else f"{hours:.4f}"


def device_hours(told: Hours) -> str:
    """What hours times ranks are called: a rank has a device of its own."""
    devices = {attempt.attempt.start["device"] for attempt in told.attempts}
    return "rank-hours" if devices == {"cpu"} else "GPU-hours"
