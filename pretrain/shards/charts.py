"""The charts of a survey, each drawn into a figure of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from pretrain.console import printable
from pretrain.index.tar import BLOCK
from pretrain.shards.survey import Survey, class_name, spread, spread_of_counts

GREY = "0.45"
NAMED_CLASSES = 60  # as bars; more are a curve
_ONE_COLUMN, _COLUMN = 14, 20  # bars
_SHARD_BARS = 400
_BINS = 60
_FILL = "#5799c7"  # C0, lighter
_ENDS = 10  # classes in a table
_FAR_APART = 20  # largest over smallest from which an axis is logarithmic
_ASPECTS = {"2:1": 2.0, "4:3": 4 / 3, "1:1": 1.0, "3:4": 3 / 4, "1:2": 0.5}
# Where DejaVu has no glyph for a class name, the first of these that is installed has it.
_FALLBACK_FONTS = ("Noto Sans CJK KR", "Noto Sans CJK JP", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo")

Tables = dict[str, list[tuple[str, int]]]  # heading -> rows (name, samples)


@dataclass(frozen=True)
class Chart:
    """`draw` fills a figure whose height in inches is `height`. `text` says in words what is seen. A `wide` chart
    takes the whole width of a page, others half of it.
    """

    text: str
    draw: Callable[[Figure], None]
    height: float = 3.6
    wide: bool = False
    tables: Tables | None = None  # what a page can show as tables instead


def charts(survey: Survey) -> list[Chart]:
    """The charts that have something to show: what is the same for all samples is a `constants` sentence."""
    found: list[Chart] = []
    if len(survey.class_samples) > 1:
        found.append(_class_chart(survey))
    if len(survey.class_samples) > NAMED_CLASSES:
        found.append(_ends_chart(survey))
    if _varies(survey.label_counts):
        found.append(_labels_chart(survey))
    if len(np.unique(survey.sizes, axis=0)) > 1:
        found.append(_sizes_chart(survey))
    if _varies(survey.blocks):
        found.append(_bytes_chart(survey))
    if len(survey.shard_bytes) > 1:
        found.append(_shard_chart(survey))
    return found


def constants(survey: Survey) -> list[str]:
    """Sentences on what needs no chart: the formats, and what is the same everywhere."""
    formats = ", ".join(f"{name} {count:,}" for name, count in survey.formats.items())
    found = [f"{len(survey.looks):,} images looked at: {formats or 'none of them decodes'}."]
    sizes = np.unique(survey.sizes, axis=0)
    if len(sizes) == 1:
        width, height = sizes[0].tolist()
        found.append(f"Every image looked at is {width:,} × {height:,}.")
    if not _varies(survey.blocks):
        found.append(f"Every sample takes {bytes_text(spread_of_counts(survey.blocks)['min'] * BLOCK)} of its shard.")
    if survey.index.multilabel and not _varies(survey.label_counts):
        found.append(f"Labels per sample: {spread_of_counts(survey.label_counts)['min']:,} throughout.")
    return found


def bytes_text(count: float) -> str:
    """4608 -> "4.61 kB"."""
    scale, unit = _byte_unit(count)
    return f"{count / scale:.0f} {unit}" if count >= 99.5 * scale else f"{count / scale:.3g} {unit}"


@cache
def name_style() -> dict[str, Any]:
    """How text from outside is set: in a font that has it, and never read as mathematics."""
    installed = {font.name for font in fontManager.ttflist}
    return {
        "parse_math": False,
        "fontfamily": ["DejaVu Sans", *(font for font in _FALLBACK_FONTS if font in installed)],
    }


def shortened(name: str, letters: int) -> str:
    name = printable(name)
    return name if len(name) <= letters else name[: letters - 1].rstrip() + "…"


def _varies(counts: NDArray[np.int64]) -> bool:
    return int(np.count_nonzero(counts)) > 1


def _class_chart(survey: Survey) -> Chart:
    counts = survey.class_samples
    empty = int((counts == 0).sum())
    found = spread(counts[counts > 0])
    text = f"{len(counts):,} classes" + (f", {empty:,} of them empty" if empty else "")
    if found["min"] == found["max"]:
        text += f": {found['min']:,} samples each"
    else:
        text += f": {found['min']:,} … {found['max']:,} samples, median {found['median']:,.10g}"
    if len(counts) > NAMED_CLASSES:
        return Chart(text, lambda figure: _ranks(figure.subplots(), counts, text))
    columns = 1 if len(counts) <= _ONE_COLUMN else max(2, -(-len(counts) // _COLUMN))
    rows = -(-len(counts) // columns)
    return Chart(
        text,
        lambda figure: _bars(figure, survey, text, columns, rows),
        height=3.6 if columns == 1 else 0.9 + 0.2 * rows,
        wide=columns > 1,
    )


def _bars(figure: Figure, survey: Survey, title: str, columns: int, rows: int) -> None:
    counts = survey.class_samples
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for column, axes in enumerate(figure.subplots(1, columns, sharex=True, squeeze=False)[0]):
        labels = range(column * rows, min((column + 1) * rows, len(counts)))
        bars = axes.barh(range(len(labels)), counts[labels.start : labels.stop], height=0.65, color=_FILL)
        axes.bar_label(bars, [f"{counts[label]:,}" for label in labels], padding=3, fontsize=7, color=GREY)
        names = [shortened(class_name(survey.index, label), 28) for label in labels]
        axes.set_yticks(range(len(labels)), names, fontsize=8, **name_style())
        axes.set_ylim(rows - 0.4, -0.6)  # the first class on top; a shorter last column has bars as thick
        axes.set_xlim(0, 1.15 * counts.max())
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)


def _ranks(axes: Axes, counts: NDArray[np.int64], title: str) -> None:
    """Samples of each class that has any, from the largest to the smallest."""
    ordered = np.sort(counts[counts > 0])[::-1]
    half = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)) + 1
    ranks = np.arange(1, len(ordered) + 1)
    _frame(axes, title)
    axes.fill_between(ranks, ordered, step="mid", alpha=0.2, linewidth=0)
    axes.step(ranks, ordered, where="mid")
    if ordered[0] >= _FAR_APART * ordered[-1]:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(0.7, 0.7 * ordered[-1]))
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(0.5, len(ordered) + 0.5)
    axes.axvline(half, color="0.2", linestyle=":")
    axes.set_xlabel(f"classes by size; the first {half:,} (dotted) hold half of all labels")
    axes.set_ylabel("samples")
    _plain(axes.xaxis, axes.yaxis)


def _ends_chart(survey: Survey) -> Chart:
    """The largest classes, and the smallest of those that are not empty."""
    counts = survey.class_samples
    order = [label for label in np.argsort(-counts, kind="stable").tolist() if counts[label]]
    tables = {
        heading: [(class_name(survey.index, label), int(counts[label])) for label in labels]
        for heading, labels in (("most samples", order[:_ENDS]), ("fewest samples", order[: -_ENDS - 1 : -1]))
    }

    def draw(figure: Figure) -> None:
        for axes, (heading, rows) in zip(figure.subplots(1, 2), tables.items(), strict=True):
            axes.set_axis_off()
            axes.set_title(heading, fontsize=10, loc="left")
            for row, (name, samples) in enumerate(rows):
                place = 0.95 - row / _ENDS
                axes.text(0, place, shortened(name, 26), fontsize=8, va="center", **name_style())
                axes.text(0.95, place, f"{samples:,}", fontsize=8, va="center", ha="right", color=GREY)

    return Chart("Classes with the most and the fewest samples", draw, tables=tables)


def _labels_chart(survey: Survey) -> Chart:
    text = f"Labels per sample: {survey.labels_mean:,.2f} on average, at most {survey.index.longest:,}"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _frame(axes, text)
        _distribution(axes, survey.label_counts, 1, str)
        axes.set_xlabel("labels")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return Chart(text, draw)


def _bytes_chart(survey: Survey) -> Chart:
    found = spread_of_counts(survey.blocks)
    low, middle, high = (bytes_text(found[name] * BLOCK) for name in ("min", "median", "max"))
    text = f"Bytes per sample in its shard: {low} … {high}, median {middle}"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _frame(axes, text)
        scale, unit = _byte_unit(found["median"] * BLOCK)
        _distribution(axes, survey.blocks, BLOCK / scale, lambda value: bytes_text(value * scale))
        axes.axvline(found["median"] * BLOCK / scale, color="0.2", linestyle=":")
        axes.set_xlabel(f"{unit}; dotted: the median")

    return Chart(text, draw)


def _distribution(axes: Axes, counts: NDArray[np.int64], unit: float, say: Callable[[Any], str]) -> None:
    """A histogram of values, counts[k] of them k units; a long thin tail is said instead of shown."""
    [present] = np.nonzero(counts)
    low, high = int(present[0]), int(present[-1])
    below = np.cumsum(counts)
    shown = int(np.searchsorted(below, 0.995 * below[-1]))
    if high - low <= 2 * (shown - low) or high - low < _BINS:
        shown = high
    width = -(-(shown + 1 - low) // _BINS)
    edges = np.arange(low, shown + 1 + width, width)
    bins = np.diff(below[np.minimum(edges[1:], shown + 1) - 1], prepend=0)
    axes.stairs(bins, (edges - 0.5) * unit, fill=True, color=_FILL)
    axes.set_xlim((edges[0] - 0.5 - width / 4) * unit, (edges[-1] - 0.5 + width / 4) * unit)
    axes.set_ylabel("samples")
    _plain(axes.yaxis)
    if shown < high:
        beyond = (
            f"{100 * (1 - below[shown] / below[-1]):.2g} % above {say(shown * unit)}, the largest {say(high * unit)}"
        )
        axes.text(0.99, 0.97, beyond, transform=axes.transAxes, ha="right", va="top", fontsize=8, color=GREY)


def _sizes_chart(survey: Survey) -> Chart:
    """Width against height, areas by how many images share a size, with lines of equal aspect."""
    unique, count = np.unique(survey.sizes, axis=0, return_counts=True)
    (left, bottom), (right, top) = unique.min(axis=0).tolist(), unique.max(axis=0).tolist()
    middle = " × ".join(f"{median:,.10g}" for median in np.median(survey.sizes, axis=0))
    text = f"Image sizes: widths {left:,} … {right:,}, heights {bottom:,} … {top:,}, median {middle}"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _frame(axes, text, pad=16)
        areas = 10 + 250 * (count - 1) / len(survey.sizes)
        axes.scatter(unique[:, 0], unique[:, 1], s=areas, alpha=0.5, linewidth=0, zorder=3)
        if max(right / left, top / bottom) >= _FAR_APART:
            axes.set(xscale="log", yscale="log", xlim=(left / 1.3, 1.3 * right), ylim=(bottom / 1.3, 1.3 * top))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_minor_formatter(NullFormatter())
        else:
            axes.set(xlim=(0, 1.08 * right), ylim=(0, 1.08 * top))
        _plain(axes.xaxis, axes.yaxis)
        _aspect_lines(axes)
        axes.set_xlabel("width, pixels")
        axes.set_ylabel("height, pixels")

    return Chart(text, draw)


def _aspect_lines(axes: Axes) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for name, aspect in _ASPECTS.items():
        x0, x1 = max(left, bottom * aspect), min(right, top * aspect)
        if x0 >= x1:
            continue
        axes.plot([x0, x1], [x0 / aspect, x1 / aspect], color=GREY, linestyle=":", linewidth=0.8)
        aside = x1 == right  # the line leaves through the right edge, else through the upper
        axes.annotate(
            name,
            (x1, x1 / aspect),
            (3, 0) if aside else (0, 3),
            textcoords="offset points",
            ha="left" if aside else "center",
            va="center" if aside else "bottom",
            fontsize=7,
            color=GREY,
        )


def _shard_chart(survey: Survey) -> Chart:
    samples, size = spread(survey.shard_samples), spread(survey.shard_bytes)
    text = (
        f"{len(survey.shard_bytes):,} shards: {samples['min']:,} … {samples['max']:,} samples, "
        f"{bytes_text(size['min'])} … {bytes_text(size['max'])}"
    )

    def draw(figure: Figure) -> None:
        scale, unit = _byte_unit(size["median"])
        above, below = figure.subplots(2, 1, sharex=True)
        _frame(above, text)
        _frame(below, "")
        _by_shard(above, survey.shard_samples)
        _by_shard(below, survey.shard_bytes / scale)
        above.set_ylabel("samples")
        below.set_ylabel(unit)
        below.set_xlabel("shard")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(below.xaxis, above.yaxis)

    return Chart(text, draw)


def _by_shard(axes: Axes, values: NDArray[Any]) -> None:
    if len(values) <= _SHARD_BARS:
        axes.bar(range(len(values)), values, width=0.7, color=_FILL)
    else:  # the smallest of neighbours, and above it the largest
        edges = np.arange(_SHARD_BARS + 1) * len(values) // _SHARD_BARS
        axes.stairs(np.maximum.reduceat(values, edges[:-1]), edges - 0.5, fill=True, color=_FILL, alpha=0.4)
        axes.stairs(np.minimum.reduceat(values, edges[:-1]), edges - 0.5, fill=True, color=_FILL)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_ylim(0, 1.08 * values.max())


def _frame(axes: Axes, title: str, pad: float = 6) -> None:
    axes.set_title(title, fontsize=10, loc="left", pad=pad)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _plain(*axes: Any) -> None:
    """Ticks as people write numbers: 1,500 and 20k, never 1.5e3."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale:
            return f"{value / scale:g}{unit}"
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"


def _byte_unit(count: float) -> tuple[float, str]:
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return scale, unit
    return 1.0, "B"
