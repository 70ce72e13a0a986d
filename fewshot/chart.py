"""The report's charts, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

from fewshot.store import whole

_DASHES = {"pixels": ":", "untrained": "--"}


def draw_charts(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Write accuracy.png, and oracle.png where there is a sweep; their names, none without matplotlib."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no state
    except ImportError:
        return []
    charts: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {"accuracy.png": _accuracy}
    if report["oracle"]["curves"]:
        charts["oracle.png"] = _oracle
    for name, draw in charts.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, report)
        axes.set_ylabel("accuracy on the query set, %")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
        image = BytesIO()
        figure.savefig(image, format="png", dpi=140)
        with whole(folder / name) as file:
            file.write(image.getvalue())
    return list(charts)


def _accuracy(axes: Any, report: Mapping[str, Any]) -> None:
    """Ridge (else the first probe): mean and standard deviation against shots, a line for each feature."""
    probes, shots = list(report["protocol"]["probes"]), report["protocol"]["shots"]
    probe = "ridge" if "ridge" in probes else probes[0]
    colours = _colours()
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in report["summary"]:
        if row["probe"] == probe:
            lines.setdefault((row["weights"], row["features"]), []).append(row)
    several = len(report["weights"]) > 1
    for (id, feature), rows in lines.items():
        axes.errorbar(
            [row["shots"] for row in rows],
            [100 * row["mean"] for row in rows],
            yerr=[100 * (row["std"] or 0) for row in rows],
            label=f"{id} {feature}" if several else feature,
            color="0.45" if feature in _DASHES else next(colours),
            linestyle=_DASHES.get(feature, "-"),
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.minorticks_off()
    axes.set_xlabel("labelled images of each class")
    axes.set_title(f"{report['name']}: {probe} on frozen features", fontsize=10)


def _oracle(axes: Any, report: Mapping[str, Any]) -> None:
    """Mean over seeds against λ, a line for each number of shots."""
    colours = _colours()
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for curve in report["oracle"]["curves"]:
        groups.setdefault((curve["weights"], curve["features"], curve["shots"]), []).append(curve)
    for (id, feature, shots), curves in groups.items():
        seeds = zip(*(curve["accuracy"] for curve in curves), strict=True)
        mean = [100 * sum(values) / len(curves) for values in seeds]
        axes.plot(curves[0]["l2"], mean, label=f"{id} {feature} {shots}-shot", color=next(colours))
    l2 = report["protocol"]["l2"]
    axes.axvline(l2, color="0.45", linestyle=":", label=f"λ = {l2:g}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("λ")
    axes.set_title(f"{report['name']}: oracle on the query set, not a result", fontsize=10)


def _colours() -> Iterator[str]:
    return cycle(f"C{number}" for number in range(10))
