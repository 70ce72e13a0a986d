"""The charts of a report: for its page, and two of them as PNGs beside report.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fewshot.report.labels import (
    headline_shots,
    is_baseline,
    newest_steps,
    ordered_features,
    side_labels,
    weights_label,
)
from pretrain.page.figure import GREY, draw_png, mark, name_style, set_frame, set_plain_ticks
from pretrain.page.page import Chart
from pretrain.page.text import shortened

Report = Mapping[str, Any]
Rows = list[Mapping[str, Any]]

HEIGHT = 4.2  # inches of a chart over the whole width
_WIDTH = 9.6  # inches of a PNG beside report.md
_LINES = 12  # of a chart; more cannot be told apart
_ACROSS = 4  # baselines that lie across a chart
_COLOURS = 8  # of the dark page; after them lines are dashed
_BASELINE_DASHES = {"pixels": ":", "untrained": "--"}


def draw_charts(report: Report) -> dict[str, bytes]:
    """The PNGs by name: accuracy.png; training.png of several steps of a run; oracle.png where there is a sweep."""
    found = {"accuracy.png": shots_chart(report)}
    if steps := steps_chart(report):
        found["training.png"] = steps
    if report["oracle"]["curves"]:
        found["oracle.png"] = oracle_chart(report)
    return {name: draw_png(chart.draw, _WIDTH, HEIGHT) for name, chart in found.items()}


def shots_chart(report: Report) -> Chart:
    """The first probe: mean and standard deviation against shots, a line for each feature of each run's newest step."""
    probe, shots = _first_probe(report), report["protocol"]["shots"]
    means = _grouped((row for row in report["summary"] if row["probe"] == probe), "weights", "features")
    newest = newest_steps(report)
    groups = {pair: means[pair] for pair in ordered_features(report) if pair[0] in newest or is_baseline(report, *pair)}
    drawn = _drawn(report, groups)
    text = f"{probe} on frozen features, mean ± std over the draws"

    def draw(figure: Figure) -> None:
        axes = _axes(figure, f"{report['name']}: {text}")
        colours = cycle(f"C{number}" for number in range(_COLOURS))
        lines: list[tuple[Any, str]] = []
        for key, rows in drawn.items():
            baseline = is_baseline(report, *key)
            line = axes.errorbar(
                [row["shots"] for row in rows],
                [100 * row["mean"] for row in rows],
                yerr=[100 * (row["std"] or 0) for row in rows],
                color=GREY if baseline else next(colours),
                linestyle=_BASELINE_DASHES.get(key[1], "-"),
                marker="o",
                markersize=4,
                capsize=3,
            )
            lines.append((line, _label(report, *key)))
        chance = axes.axhline(100 * report["protocol"]["chance"], color=GREY, linewidth=0.8)
        lines.append((chance, "chance"))
        axes.set_xscale("log")
        axes.set_xticks(shots, [str(k) for k in shots])
        axes.minorticks_off()
        axes.set_xlabel("labelled images of each class")
        axes.set_ylabel("accuracy on the query set, %")
        _legend(figure, lines)

    told = "; ".join(
        f"{_label(report, *key)} " + ", ".join(f"{100 * row['mean']:.1f} at {row['shots']}" for row in rows)
        for key, rows in drawn.items()
    )
    return Chart(f"Accuracy in % by shots of {text}: {told}.{_left_out(groups, drawn)}", draw, HEIGHT)


def oracle_chart(report: Report) -> Chart:
    """Mean over seeds against λ, a line for each number of shots."""
    newest = newest_steps(report)
    curves = [curve for curve in report["oracle"]["curves"] if curve["weights"] in newest]
    groups = _grouped(curves, "weights", "features", "shots")
    drawn = dict(list(groups.items())[:_LINES])
    means = {
        key: [100 * fmean(values) for values in zip(*(curve["accuracy"] for curve in curves), strict=True)]
        for key, curves in drawn.items()
    }
    strengths = report["oracle"]["curves"][0]["l2"]

    def draw(figure: Figure) -> None:
        axes = _axes(figure, f"{report['name']}: oracle on the query set, not a result")
        lines: list[tuple[Any, str]] = []
        for number, (key, mean) in enumerate(means.items()):
            dashes = "-" if number < _COLOURS else "--"
            [line] = axes.plot(strengths, mean, color=f"C{number % _COLOURS}", linestyle=dashes)
            lines.append((line, f"{_label(report, *key[:2])} {key[2]}-shot"))
        fixed = report["protocol"]["l2"]
        lines.append((axes.axvline(fixed, color=GREY, linestyle=":"), f"λ = {fixed:g}"))
        axes.set_xscale("log", base=2)
        axes.set_xlabel("λ")
        axes.set_ylabel("accuracy on the query set, %")
        _legend(figure, lines)

    told = "; ".join(f"{_label(report, *key[:2])} {key[2]}-shot {max(mean):.1f} %" for key, mean in means.items())
    title = "Oracle, not a result: accuracy on the query set for every λ"
    return Chart(f"{title}. At its best λ: {told}.{_left_out(groups, drawn)}", draw, HEIGHT)


def probes_chart(report: Report) -> Chart:
    """The probes side by side, on each network's leading feature."""
    newest = newest_steps(report)
    leading = {one["id"]: one["headline"] for one in report["weights"] if one["id"] in newest}
    rows = [row for row in _at_headline(report) if row["features"] == leading.get(row["weights"])]
    title = f"Probes at {_shots(report)}, on {' or '.join(dict.fromkeys(row['features'] for row in rows))}"
    return _side_by_side(report, title, "probe", rows)


def features_chart(report: Report) -> Chart:
    """The features side by side, under the first probe."""
    probe = _first_probe(report)
    newest = newest_steps(report)
    rows = [
        row
        for row in _at_headline(report)
        if row["probe"] == probe and (row["weights"] in newest or is_baseline(report, row["weights"], row["features"]))
    ]
    return _side_by_side(report, f"Features at {_shots(report)}, {probe}", "features", rows)


def _side_by_side(report: Report, title: str, by: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    """A line of dots for each value of `by`: one for each network, with the deviation of its draws."""
    names = list(dict.fromkeys(row[by] for row in rows))
    groups = _grouped(rows, "weights")
    drawn = dict(list(groups.items())[:_COLOURS])

    def draw(figure: Figure) -> None:
        axes = _axes(figure, title)
        lines: list[tuple[Any, str]] = []
        for number, ((id,), its) in enumerate(drawn.items()):
            offset = 0.5 * ((number + 0.5) / len(drawn) - 0.5)  # side by side where they would lie on one another
            line = axes.errorbar(
                [100 * row["mean"] for row in its],
                [names.index(row[by]) + offset for row in its],
                xerr=[100 * (row["std"] or 0) for row in its],
                color=f"C{number}",
                linestyle="",
                marker="o",
                markersize=5,
                capsize=3,
            )
            lines.append((line, id))
        axes.set_yticks(range(len(names)), [shortened(name, 24) for name in names], **name_style())
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("accuracy on the query set, %; bars: std over the draws")
        mark(axes, 100 * report["protocol"]["chance"])
        if len(drawn) > 1:
            _legend(figure, lines, "outside lower center")

    told = "; ".join(f"{row['weights']} {row[by]} {100 * row['mean']:.1f} %" for its in drawn.values() for row in its)
    return Chart(f"{title}: {told}. Dotted: chance.{_left_out(groups, drawn)}", draw)


def steps_chart(report: Report) -> Chart | None:
    """Accuracy over training, where a run has several checkpoints in the report; None where none has.

    A line for each run, raw or averaged, at every number of shots, or at the headline's where those are too many. Its
    baselines, at the headline's shots, and chance lie across.
    """
    probe, at = _first_probe(report), headline_shots(report)
    trained = (one for one in report["weights"] if one["step"] is not None and one["headline"])
    runs = {
        f"{run}{' averaged' if averaged else ''} {feature}": sorted(checkpoints, key=lambda one: int(one["step"]))
        for (run, averaged, feature), checkpoints in _grouped(trained, "run", "averaged", "headline").items()
        if len({one["step"] for one in checkpoints}) > 1
    }
    if not runs:
        return None
    shots = report["protocol"]["shots"] if len(runs) * len(report["protocol"]["shots"]) <= _LINES else [at]
    means = {(row["weights"], row["features"], row["shots"]): row for row in report["summary"] if row["probe"] == probe}
    found = {
        f"{label} {k}-shot": [(one["step"], means[one["id"], one["headline"], k]) for one in checkpoints]
        for label, checkpoints in runs.items()
        for k in shots
    }
    points = dict(list(found.items())[:_LINES])
    across = {
        f"{_label(report, id, feature)} {at}-shot": (feature, 100 * means[id, feature, at]["mean"])
        for id, feature in ordered_features(report)
        if is_baseline(report, id, feature)
    }
    across = dict(list(across.items())[:_ACROSS]) | {"chance": ("chance", 100 * report["protocol"]["chance"])}

    def draw(figure: Figure) -> None:
        axes = _axes(figure, f"{report['name']}: {probe} over training, mean ± std over the draws")
        lines: list[tuple[Any, str]] = []
        for number, (label, its) in enumerate(points.items()):
            line = axes.errorbar(
                [step for step, _ in its],
                [100 * row["mean"] for _, row in its],
                yerr=[100 * (row["std"] or 0) for _, row in its],
                color=f"C{number % _COLOURS}",
                linestyle="-" if number < _COLOURS else "--",
                marker="o",
                markersize=4,
                capsize=3,
            )
            lines.append((line, label))
        for label, (feature, height) in across.items():
            dashes = _BASELINE_DASHES.get(feature, "-")
            lines.append((axes.axhline(height, color=GREY, linestyle=dashes, linewidth=0.8), label))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        set_plain_ticks(axes.xaxis)
        axes.set_xlabel("step")
        axes.set_ylabel("accuracy on the query set, %")
        _legend(figure, lines)

    told = "; ".join(
        [
            f"{label} " + ", ".join(f"{100 * row['mean']:.1f} at {step:,}" for step, row in its)
            for label, its in points.items()
        ]
        + [f"{label} {height:.1f}" for label, (_, height) in across.items()]
    )
    return Chart(f"Accuracy over training in %, {probe}: {told}.{_left_out(found, points)}", draw, HEIGHT)


def comparisons_chart(report: Report) -> Chart | None:
    """The intervals of the differences at the headline's shots; None where nothing is compared."""
    rows = [row for row in report["comparisons"]["rows"] if row["shots"] == headline_shots(report)]
    if not rows:
        return None
    shown = rows[:_LINES]
    first = " ".join(shown[0]["a"].values())

    def draw(figure: Figure) -> None:
        axes = _axes(figure, f"How far {first} is ahead at {_shots(report)}, of:")
        middle = [100 * row["difference"] for row in shown]
        low, high = ([100 * abs(row["difference"] - row[end]) for row in shown] for end in ("low", "high"))
        axes.errorbar(middle, range(len(shown)), xerr=[low, high], color="C0", linestyle="", marker="o", capsize=3)
        mark(axes, 0)
        axes.set_yticks(
            range(len(shown)), [shortened(side_labels(report, row)[1], 40) for row in shown], **name_style()
        )
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("points; bars: 95 % interval over the query images; dotted: no difference")

    told = "; ".join(
        f"of {side_labels(report, row)[1]} {100 * row['difference']:+.1f} "
        f"({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        for row in shown
    )
    text = f"{first} is ahead at {_shots(report)}, in points, {told}.{_left_out(rows, shown)}"
    return Chart(text, draw, 1.2 + 0.35 * len(shown))


# What charts share


def _axes(figure: Figure, title: str) -> Axes:
    axes = figure.add_subplot()
    set_frame(axes, "")
    axes.set_title(shortened(title, 90), fontsize=10, loc="left", **name_style())
    return axes


def _legend(
    figure: Figure,
    lines: Sequence[tuple[Any, str]],
    place: Literal["outside right upper", "outside lower center"] = "outside right upper",
) -> None:
    legend = figure.legend([line for line, _ in lines], map(str, range(len(lines))), loc=place, frameon=False)
    for text, (_, label) in zip(legend.get_texts(), lines, strict=True):
        # Set afterwards: matplotlib leaves out labels that begin with "_".
        text.set(text=shortened(label, 60), fontsize=8, **name_style())


def _first_probe(report: Report) -> str:
    return str(next(iter(report["protocol"]["probes"])))


def _shots(report: Report) -> str:
    shots = headline_shots(report)
    return f"{shots} shot{'s' if shots > 1 else ''}"


def _at_headline(report: Report) -> Rows:
    return [row for row in report["summary"] if row["shots"] == headline_shots(report)]


def _label(report: Report, id: str, feature: str) -> str:
    return f"{weights_label(report, id, feature)} {feature}" if len(report["weights"]) > 1 else feature


def _grouped(rows: Iterable[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], Rows]:
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _drawn(report: Report, groups: dict[tuple[Any, ...], Rows]) -> dict[tuple[Any, ...], Rows]:
    """All groups (weights, features) or, of many, those that matter most: leading features, then baselines."""
    leading = {(one["id"], one["headline"]) for one in report["weights"]}

    def rank(key: tuple[Any, ...]) -> int:
        return 0 if key in leading else 1 if is_baseline(report, *key) else 2

    kept = set(sorted(groups, key=rank)[:_LINES])
    return {key: rows for key, rows in groups.items() if key in kept}


def _left_out(found: Sequence[Any] | Mapping[Any, Any], drawn: Sequence[Any] | Mapping[Any, Any]) -> str:
    return f" {len(found) - len(drawn):,} more are left out." if len(found) > len(drawn) else ""
