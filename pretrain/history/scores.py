"""Charts and a table of what evaluations found while a run trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from pretrain.history.curves import curve_text, draw_starts, name_lines
from pretrain.history.history import RunHistory
from pretrain.history.overlay import Overlay, Style
from pretrain.history.series import Series
from pretrain.page.figure import name_style, set_frame, set_plain_ticks
from pretrain.page.page import Chart
from pretrain.page.text import Table, shortened
from pretrain.record.folder import scores_in


@dataclass(frozen=True)
class Score:
    """Values of evaluations that share a chart: one name, of the raw and the averaged weights, at several shots.

    curves: the run's style, the variant, its name in metrics.jsonl, and the values.
    """

    title: str
    curves: Sequence[tuple[Style, str, str, Series]]


_SHARE = re.compile(r"top[15]|shot")  # values in [0, 1] that are shown in %


def scores(overlay: Overlay) -> list[Score]:
    """What the runs' evaluations found, a chart for each kind."""
    names = dict.fromkeys(name for run in overlay.runs for line in run.evaluations for name in scores_in(line))
    kinds: dict[str, list[tuple[Style, str, str, Series]]] = {}
    for name in names:
        kind, variant = _kind(name)
        factor = 100 if _SHARE.search(name) else 1
        for run, style in zip(overlay.runs, overlay.styles(), strict=True):
            series = Series.of(run.evaluations, name, overlay.scale(run))
            if len(series.known.x):
                kinds.setdefault(kind, []).append((style, variant, name, Series(series.x, series.y * factor)))
    return [Score(kind, found) for kind, found in kinds.items()]


def _kind(name: str) -> tuple[str, str]:
    """A value's kind and variant: ("fewshot/k-shot_ridge", "averaged, 5-shot") of averaged/fewshot/5shot_ridge."""
    averaged = name.startswith("averaged/")
    name = name.removeprefix("averaged/")
    shots = re.search(r"(?<![0-9])([0-9]+)shot", name)
    kind = name if shots is None else f"{name[: shots.start()]}k-shot{name[shots.end() :]}"
    variant = [f"{shots[1]}-shot"] if shots else []
    return kind, ", ".join([*(["averaged"] if averaged else []), *variant])


def leading_score(run: RunHistory) -> dict[str, str]:
    """The last value of one score under its name: of top-1 where it was evaluated, else of the first share or score."""
    names = dict.fromkeys(name for line in run.evaluations for name in scores_in(line))
    if not names:
        return {}
    name = min(names, key=lambda name: (not _SHARE.search(name), not name.startswith("eval/")))
    known = Series.of(run.evaluations, name).known
    return {f"{name}, last": _value_text(name, known.y[-1])} if len(known.y) else {}


def _value_text(name: str, value: float) -> str:
    """A score as it stands in `metrics.jsonl`; a share in %."""
    return f"{100 * value:.2f} %" if _SHARE.search(name) else f"{value:.4g}"


def score_charts(overlay: Overlay) -> list[Chart]:
    """A chart for each kind of score that an evaluation found more than once, or several runs did."""
    return [_score_chart(overlay, score) for score in scores(overlay)]


def _score_chart(overlay: Overlay, score: Score) -> Chart:
    unit = "%" if _SHARE.search(score.title) else ""
    variants = list(dict.fromkeys(variant for _, variant, *_ in score.curves))
    several = len(overlay.runs) > 1

    def name(style: Style, variant: str) -> str:
        return ", ".join(
            filter(None, [style.label if several else "", variant or ("raw" if len(variants) > 1 else "")])
        )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        set_frame(axes, "")
        axes.set_title(shortened(score.title, 60), fontsize=10, loc="left", **name_style())
        drawn = []
        for style, variant, _, series in score.curves:
            at = variants.index(variant)
            colour = style.colour if several else f"C{at % 8}"
            known = series.known
            fill = "none" if several and at % 2 else colour
            drawn += axes.plot(
                known.x,
                known.y,
                color=colour,
                linestyle=("-", "--", ":", "-.")[at % 4],
                marker=style.marker if several else "os^DvPX*"[at % 8],
                markersize=4,
                markerfacecolor=fill,
            )
        axes.set_xlim(0, overlay.end * 1.02)
        axes.set_xlabel(overlay.axis)
        axes.set_ylabel(unit)
        set_plain_ticks(axes.xaxis)
        draw_starts(axes, overlay)
        if len(drawn) > 1:
            name_lines(axes, drawn, [name(style, variant) for style, variant, *_ in score.curves])

    parts = [
        (f"{name(style, variant)}: " if name(style, variant) else "") + curve_text(series, unit, overlay.axis)
        for style, variant, _, series in score.curves
    ]
    return Chart(f"{score.title}, by {overlay.axis}. " + "; ".join(parts), draw)


def scores_table(overlay: Overlay) -> Table | None:
    """A row for each score of each run: the last, the lowest and the highest value, and after how many steps."""
    several = len(overlay.runs) > 1
    rows = []
    for score in scores(overlay):
        percent = bool(_SHARE.search(score.title))
        for style, _, name, series in score.curves:
            known = series.known
            row = [style.label] if several else []
            row.append(name)
            for at in (-1, int(known.y.argmin()), int(known.y.argmax())):
                row += [f"{known.y[at]:.2f} %" if percent else f"{known.y[at]:.4g}", f"{known.x[at]:,.0f}"]
            rows.append(row)
    if not rows:
        return None
    header = [
        "evaluation",
        "last",
        f"at {overlay.axis}",
        "lowest",
        f"at {overlay.axis}",
        "highest",
        f"at {overlay.axis}",
    ]
    return Table((["run"] if several else []) + header, rows, "Evaluations", names=2 if several else 1)
