"""An evaluation as people read it: the console's table, report.md, report.html and the charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.console import isolated
from pretrain.page.confusion import HEIGHT, Confusions, class_tables, draw_confusions, mistakes_table
from pretrain.page.figure import FILL, GREY, draw_png, name_style, set_frame
from pretrain.page.page import Chart, Page
from pretrain.page.text import Table, markdown_text, shortened

Report = Mapping[str, Any]

_WIDTH = 12.8  # inches of a chart


# Tables


def table(report: Report) -> str:
    """The console's table, and what limits its meaning."""
    summary = _summary(report)
    paths = [f"{isolated(one['id'])}: {isolated(one['checkpoint'])}" for one in report["weights"]]
    lines = [summary.caption, *summary.text(), *paths, *_notes(report)]
    return "\n".join(lines)


def markdown(report: Report, charts: Sequence[str]) -> str:
    """The content of report.md."""
    summary = _summary(report)
    lines = [f"# Evaluation: {markdown_text(report['name'])}", "", f"{summary.caption}.", "", *summary.markdown(), ""]
    lines += [f"- {markdown_text(note)}" for note in _notes(report)]
    lines += [f"\n![{chart}]({chart})" for chart in charts]
    for title, tables in (("Classes", _classes(report)), ("Most frequent mistakes", _mistakes(report))):
        lines += ["", f"## {title}"]
        for one in tables:
            lines += ["", *([f"{markdown_text(one.caption)}:", ""] if one.caption else []), *one.markdown()]
    lines += ["", "## To get this again", ""]
    lines += [f"- {markdown_text(text)}" for text in _protocol(report)]
    return "\n".join(lines) + "\n"


def html(report: Report, confusions: Sequence[Confusions]) -> str:
    """The content of report.html. `confusions`: of each of the weights."""
    page = Page(f"Evaluation: {report['name']}")
    summary = _summary(report)
    if len(summary.rows) == 1:
        page.cards(dict(zip(summary.header[1:], summary.rows[0][1:], strict=True)))
    else:
        page.table(Table(summary.header, summary.rows))
    page.notes([f"{summary.caption}."])
    page.notes(_notes(report), warning=True)
    page.grid(charts(report, confusions))
    page.heading("Classes")
    page.grid([[one] for one in _classes(report)])
    page.heading("Most frequent mistakes")
    page.grid([[one] for one in _mistakes(report)])
    page.heading("To get this again")
    page.notes(_protocol(report))
    return page.html()


def _main(report: Report) -> list[Mapping[str, Any]]:
    """The results of the first set, one for each of the weights."""
    return [row for row in report["results"] if row["set"] == report["results"][0]["set"]]


def _summary(report: Report) -> Table:
    """A row for each of the weights."""
    rows, lists = _main(report), {row["weights"]: row for row in report["results"] if row["set"] == "real"}
    first = report["results"][0]["set"]
    both = first == "eval" and bool(lists)
    top = "ReaL" if first == "real" else "top-1"
    header = ["weights", top, "top-5", *(["ReaL", "ReaL top-5"] if both else []), "loss", "confidence", "ECE"]
    cells = []
    for row in rows:
        cell = [row["weights"], _percent(row["top1"]), _percent(row["top5"])]
        if both:
            cell += [_percent(lists[row["weights"]][key]) for key in ("top1", "top5")]
        loss = "–" if row["loss"] is None else f"{row['loss']:.4f}"
        cells.append([*cell, loss, _percent(row["confidence"]), _percent(row["ece"])])
    images = rows[0]["images"]
    error = max(100 * row["top1_std_error"] for row in rows)
    caption = (
        f"Accuracy, confidence and calibration error (ECE) in % on {images:,} images of data.{first} (binomial "
        f"standard error at most {error:.2f} points)"
    )
    if both:
        caption += f"; ReaL on {next(iter(lists.values()))['images']:,} of data.real"
    return Table(header, cells, caption)


def _classes(report: Report) -> list[Table]:
    """All classes, or those at the ends by accuracy, averaged over the weights; their accuracies side by side."""
    rows, single = _main(report), len(report["weights"]) == 1
    found = {row["weights"]: {one["label"]: one for one in row["classes"]} for row in rows}
    labels = sorted({label for of in found.values() for label, one in of.items() if one["images"]})

    def accuracy(label: int) -> float:
        return float(np.mean([of[label]["top1"] for of in found.values()]))

    header = ["class", "images"]
    for id in found:
        header += ["top-1", "top-5", "predicted", "precision"] if single else [id]

    def cells(label: int) -> list[str]:
        one = next(iter(found.values()))[label]
        cell = [_name(report, label), f"{one['images']:,}"]
        if single:
            cell += [_percent(one["top1"]), _percent(one["top5"]), f"{one['predicted']:,}", _percent(one["precision"])]
        else:
            cell += [_percent(of[label]["top1"]) for of in found.values()]
        return cell

    return class_tables(labels, accuracy, header, cells, "" if single else "top-1 in %")


def _mistakes(report: Report) -> list[Table]:
    """For each of the weights, the pairs of classes that are confused most often."""
    several = len(report["weights"]) > 1
    return [
        mistakes_table(
            [(one["label"], one["predicted"], one["images"]) for one in row["confusions"]],
            partial(_name, report),
            row["weights"] if several else "",
        )
        for row in _main(report)
    ]


def _protocol(report: Report) -> list[str]:
    """How the scores came about, a line each."""
    protocol = report["protocol"]
    lines = []
    for one in report["weights"]:
        step = "" if one["step"] is None else f"step {one['step']:,}, "
        lines.append(
            f"{isolated(one['id'])}: {isolated(one['checkpoint'])}, {step}sha256 {one['sha256']}, {one['dtype']}, "
            f"{one['probabilities']}; images: {one['preprocessing']}"
        )
    lines += [
        f"data.{name}: {', '.join(map(isolated, one['index']))}, {one['images']:,} images, "
        f"index sha256 {one['index_sha256']}"
        for name, one in protocol["sets"].items()
    ]
    lines += [f"right: {protocol['right']}"]
    lines += [f"probabilities, {kind}: {text}" for kind, text in protocol["probabilities"].items()]
    lines += [f"loss, {kind}: {text}" for kind, text in protocol["loss"].items()]
    lines += [f"ECE: {protocol['calibration']}", f"arithmetic: {protocol['arithmetic']}"]
    lines += [f"{row['predictions']}: sha256 {row['predictions_sha256']}" for row in report["results"]]
    lines += ["versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items())]
    return [*lines, f"commit: {report['git_commit'] or 'unknown'}"]


def _notes(report: Report) -> list[str]:
    """What limits the meaning of the scores, a line each."""
    found = list(report["notes"])
    unreadable = {row["set"]: row["unreadable"] for row in report["results"] if row["unreadable"]}
    found += [
        f"data.{name}: images that do not decode and count as misses: {count:,}" for name, count in unreadable.items()
    ]
    if any(row["loss"] is None for row in _main(report)):
        found.append("softmax has no loss for images with several labels")
    if len({one["probabilities"] for one in report["weights"]}) > 1:
        found.append("losses, confidences and calibration errors of softmax and of sigmoid are not comparable")
    return found


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _name(report: Report, label: int) -> str:
    names = report["class_names"] or ()
    return names[label] if label < len(names) else str(label)


# Charts


def draw_charts(report: Report, confusions: Sequence[Confusions]) -> dict[str, bytes]:
    """The PNGs by name."""
    names = ("reliability.png", "confusion.png")
    found = charts(report, confusions)
    return {name: draw_png(one.draw, _WIDTH, one.height or 0) for name, one in zip(names, found, strict=True)}


def charts(report: Report, confusions: Sequence[Confusions]) -> list[Chart]:
    """Reliability and confusions of each of the weights."""
    rows = _main(report)
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)

    def reliability(figure: Figure) -> None:
        grid = figure.subfigures(lines, columns, squeeze=False)
        for number, row in enumerate(rows):
            parts = grid.flat[number].subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
            _draw_reliability(parts[0], parts[1], row)

    def confusion(figure: Figure) -> None:
        grid = figure.subfigures(len(rows), 1, squeeze=False)
        for number, (row, of) in enumerate(zip(rows, confusions, strict=True)):
            draw_confusions(grid.flat[number], of, partial(_name, report), row["weights"])

    errors = ", ".join(f"{row['weights']} {_percent(row['ece'])} %" for row in rows)
    return [
        Chart(f"Accuracy against confidence; calibration error: {errors}", reliability, 4.6 * lines),
        Chart("Confusions: predictions by label, and the most frequent mistakes", confusion, HEIGHT * len(rows)),
    ]


def _draw_reliability(above: Axes, below: Axes, row: Mapping[str, Any]) -> None:
    """Accuracy of each bin of confidence above, the images in it below."""
    bins = row["bins"]
    set_frame(above, "")
    above.set_title(
        shortened(f"{row['weights']}: ECE {_percent(row['ece'])} %", 60), fontsize=10, loc="left", **name_style()
    )
    set_frame(below, "")
    edges = np.array([bins[0]["low"], *(one["high"] for one in bins)])
    filled = [one for one in bins if one["images"]]
    left, width = [one["low"] for one in filled], [one["high"] - one["low"] for one in filled]
    above.bar(left, [one["accuracy"] for one in filled], width, align="edge", color=FILL, edgecolor=GREY, linewidth=0.5)
    above.plot([0, 1], [0, 1], color=rcParams["text.color"], linestyle=":")
    means = [one["confidence"] for one in filled], [one["accuracy"] for one in filled]
    above.plot(*means, "o", color="C3", markersize=3, clip_on=False, zorder=4)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    share = np.array([one["images"] for one in bins]) / max(1, sum(one["images"] for one in bins))
    below.stairs(100 * share, edges, fill=True, color=FILL)
    below.set(xlabel="confidence; dots: the mean of a bin", ylabel="% of images")
