"""The charts of a report: PNGs beside report.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewshot.report.labels import is_baseline, ordered_features, weights_label
from pretrain.page.figure import encode_figure, name_style
from pretrain.page.text import shortened

Lines = list[tuple[Any, str]]  # what is drawn, and its label

_BASELINE_DASHES = {"pixels": ":", "untrained": "--"}


def draw_charts(report: Mapping[str, Any]) -> dict[str, bytes]:
    """The PNGs by name: accuracy.png, and oracle.png where there is a sweep."""
    draws: dict[str, Callable[[Axes, Mapping[str, Any]], tuple[str, Lines]]] = {"accuracy.png": _draw_accuracy}
    if report["oracle"]["curves"]:
        draws["oracle.png"] = _draw_oracle
    charts = {}
    for name, draw in draws.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        title, lines = draw(axes, report)
        axes.set_ylabel("accuracy on the query set, %")
        axes.grid(alpha=0.3)
        axes.set_title(shortened(f"{report['name']}: {title}", 100), fontsize=10, **name_style())
        legend = figure.legend([line for line, _ in lines], map(str, range(len(lines))), loc="outside right upper")
        for text, (_, label) in zip(legend.get_texts(), lines, strict=True):
            # Set afterwards: matplotlib leaves out labels that begin with "_".
            text.set(text=shortened(label, 60), fontsize=8, **name_style())
        charts[name] = encode_figure(figure, dpi=140)
    return charts


def _draw_accuracy(axes: Axes, report: Mapping[str, Any]) -> tuple[str, Lines]:
    """The first probe: mean and standard deviation against shots, a line for each feature; its title."""
    probe, shots = next(iter(report["protocol"]["probes"])), report["protocol"]["shots"]
    colours = cycle(f"C{number}" for number in range(10))
    drawn: Lines = []
    several = len(report["weights"]) > 1
    for id, feature in ordered_features(report):
        rows = [
            row for row in report["summary"] if (row["weights"], row["features"], row["probe"]) == (id, feature, probe)
        ]
        line = axes.errorbar(
            [row["shots"] for row in rows],
            [100 * row["mean"] for row in rows],
            yerr=[100 * (row["std"] or 0) for row in rows],
            color="0.45" if is_baseline(report, id, feature) else next(colours),
            linestyle=_BASELINE_DASHES.get(feature, "-"),
            marker="o",
            markersize=4,
            capsize=3,
        )
        drawn.append((line, f"{weights_label(report, id, feature)} {feature}" if several else feature))
    drawn.append((axes.axhline(100 * report["protocol"]["chance"], color="0.7", linewidth=0.8), "chance"))
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.minorticks_off()
    axes.set_xlabel("labelled images of each class")
    return f"{probe} on frozen features, mean ± std over the draws", drawn


def _draw_oracle(axes: Axes, report: Mapping[str, Any]) -> tuple[str, Lines]:
    """Mean over seeds against λ, a line for each number of shots; its title."""
    drawn: Lines = []
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for curve in report["oracle"]["curves"]:
        groups.setdefault((curve["weights"], curve["features"], curve["shots"]), []).append(curve)
    for (id, feature, shots), curves in groups.items():
        seeds = zip(*(curve["accuracy"] for curve in curves), strict=True)
        mean = [100 * sum(values) / len(curves) for values in seeds]
        [line] = axes.plot(curves[0]["l2"], mean, color=f"C{len(drawn) % 10}")
        drawn.append((line, f"{id} {feature} {shots}-shot"))
    l2 = report["protocol"]["l2"]
    drawn.append((axes.axvline(l2, color="0.45", linestyle=":"), f"λ = {l2:g}"))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("λ")
    return "oracle on the query set, not a result", drawn
