"""Charts of what a run measured, over its steps: curves of several runs, with what happened to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pretrain.history.marks import LANES, Mark, marks
from pretrain.history.overlay import Overlay, Style
from pretrain.history.series import COLUMNS, Series
from pretrain.page.figure import GREY, name_style, set_frame, set_plain_ticks
from pretrain.page.page import Chart
from pretrain.page.text import number_text, shortened

_FAR_APART = 20  # largest over smallest from which an axis is logarithmic
_MANY = 2 * COLUMNS  # points from which a band is drawn instead of a line through each
_FAINT = 0.3
_HEIGHT, _LANE = 3.8, 0.17  # inches of the chart of the loss, and of a lane below it
_STARTS = 12  # that are told apart by lines through a chart


@dataclass(frozen=True)
class Quantity:
    """One of a training line's values.

    Args:
        name: in metrics.jsonl.
        percent: a share, shown in %.
        smooth: whether it is noisy: a smoothed curve is drawn over it.
        from_zero: whether the axis begins at 0; otherwise it may be logarithmic.
    """

    name: str
    title: str
    unit: str = ""
    percent: bool = False
    smooth: bool = True
    from_zero: bool = False


LOSS = Quantity("loss", "Loss")
QUANTITIES = (
    Quantity("lr", "Learning rate", smooth=False, from_zero=True),
    Quantity("grad_norm", "Gradient norm, before clipping"),
    Quantity("images_per_second", "Throughput", "images/s", from_zero=True),
    Quantity("data_wait", "Waiting for data, share of the time on the worst rank", percent=True, from_zero=True),
    Quantity("mfu", "Model FLOP utilisation (MFU)", percent=True, from_zero=True),
)


@dataclass(frozen=True)
class Curve:
    """What is drawn of one run: what it wrote down, smoothed, and what a resume has taken back."""

    style: Style
    raw: Series
    smooth: Series
    taken_back: Series


def curves(overlay: Overlay, quantity: Quantity) -> list[Curve]:
    """One for each run that has a number of it."""
    factor = 100 if quantity.percent else 1
    found = []
    for run, style in zip(overlay.runs, overlay.styles(), strict=True):
        scale = overlay.scale(run)
        raw, back = (
            Series(series.x, series.y * factor)
            for series in (
                Series.of(run.lines, quantity.name, scale),
                Series.of((line for line in run.discarded if "loss" in line), quantity.name, scale),
            )
        )
        if len(raw.known.x) or len(back.known.x):
            found.append(Curve(style, raw, raw.smoothed() if quantity.smooth else raw, back.parted()))
    return found


def loss_chart(overlay: Overlay) -> Chart | None:
    """The loss over the whole width, and below it what happened; None where there is none yet."""
    found, of_runs = curves(overlay, LOSS), [marks(run) for run in overlay.runs]
    if not found:
        return None
    counts = Counter(mark.lane for of_run in of_runs for mark in of_run)
    lanes = [lane for lane in LANES if counts[lane]]
    below = _LANE * (len(lanes) + 1)

    def draw(figure: Figure) -> None:
        if not lanes:
            _draw(figure.subplots(), overlay, LOSS, found)
            return
        above, under = figure.subplots(2, 1, sharex=True, height_ratios=(_HEIGHT - 0.6, below))
        _draw(above, overlay, LOSS, found)
        above.set_xlabel("")
        _draw_lanes(under, overlay, of_runs, lanes)
        under.set_xlabel(overlay.axis)
        set_plain_ticks(under.xaxis)
        if len(overlay.runs) == 1:
            _name_machines(above, of_runs[0])

    happened = ", ".join(f"{lane} {counts[lane]:,}×" for lane in lanes)
    text = _text(overlay, LOSS, found)
    return Chart(f"{text}. Below: {happened}" if happened else text, draw, _HEIGHT + below)


def charts(overlay: Overlay) -> list[Chart]:
    """The other quantities of training that any of the runs has."""
    drawn = [(quantity, curves(overlay, quantity)) for quantity in QUANTITIES]
    return [_chart(overlay, quantity, found) for quantity, found in drawn if found]


def _chart(overlay: Overlay, quantity: Quantity, found: Sequence[Curve]) -> Chart:
    return Chart(
        _text(overlay, quantity, found),
        lambda figure: _draw(figure.subplots(), overlay, quantity, found),
    )


def _draw(axes: Axes, overlay: Overlay, quantity: Quantity, found: Sequence[Curve]) -> None:
    set_frame(axes, quantity.title)
    end = overlay.end
    drawn = []
    for curve in found:
        style = curve.style
        drawn += draw_curve(axes, curve.smooth, end, color=style.colour, linestyle=style.line, linewidth=1.3)
        if curve.smooth is not curve.raw:
            draw_raw(axes, curve.raw, end, style.colour)
        back = curve.taken_back
        axes.plot(back.x, back.y, color=style.colour, linestyle=":", linewidth=0.9, alpha=0.7)
    _scale(axes, np.concatenate([curve.raw.known.y for curve in found]), quantity.from_zero)
    axes.set_xlim(0, end)
    axes.set_xlabel(overlay.axis)
    axes.set_ylabel("%" if quantity.percent else quantity.unit)
    set_plain_ticks(axes.xaxis)
    if quantity.from_zero:
        set_plain_ticks(axes.yaxis)
    draw_starts(axes, overlay)
    if len(overlay.runs) > 1:
        name_lines(axes, drawn, [curve.style.label for curve in found])


def draw_curve(axes: Axes, series: Series, end: float, **style: object) -> list[object]:
    """A line through the points; of very many, through the mean of each pixel's."""
    x, y = series.x, series.y
    if len(x) > _MANY:
        parts = series.columns(0, end)
        there = np.isfinite(parts.mean)
        x, y = parts.x[there], parts.mean[there]
    marker = "." if np.isfinite(series.y).sum() == 1 else None
    return list(axes.plot(x, y, marker=marker, **style))  # type: ignore[arg-type]


def draw_raw(axes: Axes, series: Series, end: float, colour: str) -> None:
    """Each point, faintly; of very many, from the least to the largest of each pixel's."""
    if len(series.x) <= _MANY:
        axes.plot(series.x, series.y, color=colour, linewidth=0.8, alpha=_FAINT)
        return
    parts = series.columns(0, end)
    there = np.isfinite(parts.least)
    axes.fill_between(parts.x[there], parts.least[there], parts.most[there], color=colour, linewidth=0, alpha=_FAINT)


def _scale(axes: Axes, values: np.ndarray, from_zero: bool) -> None:
    if from_zero:
        axes.set_ylim(bottom=0)
    elif len(values) and values.min() > 0 and values.max() > _FAR_APART * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        set_plain_ticks(axes.yaxis)


def name_lines(axes: Axes, drawn: Sequence[object], labels: Sequence[str]) -> None:
    """The legend. Its texts are set afterwards: matplotlib leaves out labels that begin with "_"."""
    legend = axes.legend(drawn, list(map(str, range(len(drawn)))), fontsize=8)  # type: ignore[arg-type]
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=shortened(label, 60), **name_style())


# What happened


def draw_starts(axes: Axes, overlay: Overlay) -> None:
    """A dotted line where a run was resumed, unless that was often."""
    for run, style in zip(overlay.runs, overlay.styles(), strict=True):
        resumes = [attempt.start["step"] for attempt in run.attempts[1:]]
        if len(resumes) < _STARTS:
            for step in resumes:
                colour = GREY if len(overlay.runs) == 1 else style.colour
                axes.axvline(step * overlay.scale(run), color=colour, linestyle=":", linewidth=0.8)


def _draw_lanes(axes: Axes, overlay: Overlay, of_runs: Sequence[Sequence[Mark]], lanes: Sequence[str]) -> None:
    """A lane for each kind of mark; the runs' one a little below the other's. Marks of one pixel are one."""
    pixel = overlay.end / COLUMNS
    apart = 0.6 / len(overlay.runs)
    for number, (run, style, found) in enumerate(zip(overlay.runs, overlay.styles(), of_runs, strict=True)):
        shift = (number - (len(overlay.runs) - 1) / 2) * apart
        for at, lane in enumerate(lanes):
            x = np.array([mark.step * overlay.scale(run) for mark in found if mark.lane == lane], np.float64)
            x = x[np.unique((x / pixel).round(), return_index=True)[1]]
            axes.plot(
                x,
                np.full(len(x), at + shift),
                LANES[lane],
                color=style.colour,
                markersize=5 if LANES[lane] != "|" else 6 * max(apart, 0.3) / 0.6,
                clip_on=False,
            )
    axes.set_yticks(range(len(lanes)), lanes, fontsize=8)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def _name_machines(axes: Axes, found: Sequence[Mark]) -> None:
    """On what the run trained, wherever that changed, unless that was often."""
    named = [mark for mark in found if mark.text]
    if len(named) < _STARTS:
        for mark in named:
            axes.annotate(
                mark.text,
                (mark.step, 1),
                (3, -3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=7,
                color=GREY,
            )


# In words


def _text(overlay: Overlay, quantity: Quantity, found: Sequence[Curve]) -> str:
    """What a chart shows, in words: of each run the ends and the extremes of the curve."""
    parts = []
    for curve in found:
        name = f"{curve.style.label}: " if len(overlay.runs) > 1 else ""
        parts.append(name + curve_text(curve.smooth, "%" if quantity.percent else quantity.unit, overlay.axis))
    smoothed = " (smoothed)" if any(curve.smooth is not curve.raw for curve in found) else ""
    return f"{quantity.title}{smoothed}, by {overlay.axis}. " + "; ".join(parts)


def curve_text(series: Series, unit: str, axis: str) -> str:
    """From where to where a curve goes, and its extremes where these are not its ends."""
    known = series.known
    if not len(known.x):
        return "no number"
    unit = f" {unit}" if unit else ""
    first, last = (f"{number_text(known.y[end])}{unit} at {axis} {known.x[end]:,.0f}" for end in (0, -1))
    if len(known.x) == 1:
        return last
    low, high = int(known.y.argmin()), int(known.y.argmax())
    extremes = [
        f"{word} {number_text(known.y[at])}{unit} at {axis} {known.x[at]:,.0f}"
        for word, at in (("lowest", low), ("highest", high))
        if at not in (0, len(known.x) - 1)
    ]
    return ", ".join([f"from {first} to {last}", *extremes])
