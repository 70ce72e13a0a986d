"""The page of an index: its survey as figures and charts, and a contact sheet of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

from pretrain.console import isolated
from pretrain.images.decode import UnreadableImage, decode
from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME
from pretrain.index.tar import BLOCK
from pretrain.page.bars import MOST as MOST_BARS
from pretrain.page.bars import bar_chart
from pretrain.page.figure import FILL, GREY, mark, set_frame, set_plain_ticks
from pretrain.page.page import THUMBNAIL, Chart, Page, Picture
from pretrain.page.text import Table, byte_unit, bytes_text, sentence
from pretrain.shards.survey import (
    AT_ONCE,
    Survey,
    class_name,
    read_image,
    spread,
    spread_ids,
    spread_of_counts,
    unreadable_text,
)
from pretrain.workers import in_threads

_BINS = 60
_ENDS = 10  # classes in a table
_FAR_APART = 20  # largest over smallest from which an axis is logarithmic
_FILES_NAMED = 3  # in the title
_CANDIDATES = 4096  # for the contact sheet
_LABELS_NAMED = 2  # in a picture's caption


def dataset_page(survey: Survey) -> Page:
    """The page of a survey. Raises InputError for a shard that cannot be read."""
    index = survey.index
    pictures = contact_sheet(index)
    page = Page(_title(index))
    if len(index.files) > 1:
        page.notes(f"{isolated(str(file.path))}: {file.samples:,} samples" for file in index.files)
    page.cards(_headline(survey))
    page.notes(_faults(survey, pictures), warning=True)
    page.notes(constants(survey))
    parts: list[Chart | Sequence[Table]] = [*charts(survey)]
    if ends := class_ends(survey):
        parts.insert(1, ends)  # beside the curve
    page.grid(parts)
    page.heading(f"{len(pictures)} of {index.samples:,} samples")
    page.notes(["Spread over the classes; below each its class and its id (shards.py locate INDEX ID finds it)."])
    page.pictures(pictures)
    page.notes([f"Index hash {index.hash}"])
    return page


def _title(index: Index) -> str:
    """The folders (or files) of the index files."""
    names = [str(file.path.parent if file.path.name == INDEX_NAME else file.path) for file in index.files]
    more = [f"{len(names) - _FILES_NAMED} more"] if len(names) > _FILES_NAMED else []
    return " + ".join(isolated(name) for name in names[:_FILES_NAMED] + more)


def _headline(survey: Survey) -> dict[str, str]:
    width, height = (spread(axis)["median"] for axis in survey.sizes.T)
    counts = survey.class_samples
    empty = int((counts == 0).sum())
    return {
        "samples": f"{survey.index.samples:,}",
        "bytes": bytes_text(survey.bytes),
        "shards": f"{len(survey.shard_bytes):,}",
        f"classes, {empty:,} empty" if empty else "classes": f"{len(counts):,}",
        "labels a sample": f"{survey.labels_mean:,.2f}" if survey.index.multilabel else "1",
        "median image": f"{width:,.10g} × {height:,.10g}" if width else "none",
        "unreadable": f"{len(survey.unreadable):,} of {len(survey.sampled):,}",
        "index hash": survey.index.hash[:12],
    }


def _faults(survey: Survey, pictures: Sequence[Picture]) -> list[str]:
    found = []
    if survey.unreadable:
        found.append(sentence(unreadable_text(survey.figures()["images"])))
    if dark := sum(picture.image is None for picture in pictures):
        found.append(f"On the contact sheet {dark:,} of {len(pictures):,} do not decode.")
    return found


def constants(survey: Survey) -> list[str]:
    """Sentences on what needs no chart: the formats, and what is the same for all samples."""
    formats = ", ".join(f"{name} {count:,}" for name, count in survey.formats.items())
    found = [f"{len(survey.sampled):,} images looked at: {formats or 'none of them decodes'}."]
    sizes = np.unique(survey.sizes, axis=0)
    if len(sizes) == 1:
        width, height = sizes[0].tolist()
        found.append(f"Every image looked at is {width:,} × {height:,}.")
    if not _varies(survey.blocks):
        found.append(f"Every sample takes {bytes_text(spread_of_counts(survey.blocks)['min'] * BLOCK)} of its shard.")
    if survey.index.multilabel and not _varies(survey.label_counts):
        found.append(f"Labels per sample: {spread_of_counts(survey.label_counts)['min']:,} throughout.")
    return found


# The contact sheet


def contact_sheet(index: Index, pictures: int = 48) -> list[Picture]:
    """`pictures` samples by class and id. Raises InputError for a shard that cannot be read."""
    ids = choose(index, pictures)
    return list(in_threads(lambda sample_id, _: _picture(index, sample_id), ids.tolist(), AT_ONCE))


def choose(index: Index, wanted: int) -> NDArray[np.int64]:
    """Up to `wanted` ids, by class (the first label) and id: of every class about as many; of more classes than
    `wanted`, classes spread evenly.

    Rare classes are found among 4,096 samples drawn over the whole index, not in all of it.
    """
    # Shuffled: what is taken of a class is not its first, but from anywhere.
    ids = np.random.default_rng(1).permutation(spread_ids(index.samples, max(wanted, _CANDIDATES)))
    labels = index.labels(ids)[:, :1].sum(axis=1)  # a sum, because there is no first column where all lists are empty
    classes = np.unique(labels)
    shown = classes[np.linspace(0, len(classes) - 1, min(wanted, len(classes))).round().astype(int)]
    ids, labels = (array[np.isin(labels, shown)] for array in (ids, labels))
    by_class = np.argsort(labels, kind="stable")
    ids, labels = ids[by_class], labels[by_class]
    occurrence = np.arange(len(ids)) - np.searchsorted(labels, labels)  # the occurrence number within its class
    taken = np.argsort(occurrence, kind="stable")[:wanted]
    return ids[taken[np.lexsort((ids[taken], labels[taken]))]]


def _picture(index: Index, sample_id: int) -> Picture:
    labels = [label for label in index.labels([sample_id])[0].tolist() if label >= 0]
    caption = ", ".join(isolated(class_name(index, label)) for label in labels[:_LABELS_NAMED]) or "no label"
    if len(labels) > _LABELS_NAMED:
        caption += f" +{len(labels) - _LABELS_NAMED}"
    return sample_picture(index, sample_id, caption, f"id {sample_id}")


def sample_picture(index: Index, sample_id: int, caption: str, detail: str) -> Picture:
    """A sample's image, in colour as stored. Raises InputError for a shard that cannot be read."""
    _, data = read_image(index, sample_id)
    try:
        image = Image.fromarray(decode(data, 3).permute(1, 2, 0).contiguous().numpy())
    except UnreadableImage as error:
        return Picture(caption, detail, None, str(error))
    if max(image.size) > THUMBNAIL:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return Picture(caption, detail, image)


# Charts


def charts(survey: Survey) -> list[Chart]:
    """The charts that have something to show: what is the same for all samples is a `constants` sentence."""
    found: list[Chart] = []
    if len(survey.class_samples) > 1:
        found.append(_class_chart(survey))
    if _varies(survey.label_counts):
        found.append(_labels_chart(survey))
    if len(np.unique(survey.sizes, axis=0)) > 1:
        found.append(_sizes_chart(survey))
    if _varies(survey.blocks):
        found.append(_bytes_chart(survey))
    if len(survey.shard_bytes) > 1:
        found.append(_shard_chart(survey))
    return found


def class_ends(survey: Survey) -> list[Table]:
    """Where classes are a curve: the largest, and the smallest of those that are not empty."""
    counts = survey.class_samples
    if len(counts) <= MOST_BARS:
        return []
    order = [label for label in np.argsort(-counts, kind="stable").tolist() if counts[label]]
    return [
        Table(("class", "samples"), [(class_name(survey.index, label), f"{counts[label]:,}") for label in labels], name)
        for name, labels in (("Most samples", order[:_ENDS]), ("Fewest samples", order[: -_ENDS - 1 : -1]))
    ]


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
    if len(counts) > MOST_BARS:
        return Chart(text, lambda figure: _ranks(figure.subplots(), counts, text))
    names = [class_name(survey.index, label) for label in range(len(counts))]
    return bar_chart(text, names, counts.tolist(), [f"{count:,}" for count in counts])


def _ranks(axes: Axes, counts: NDArray[np.int64], title: str) -> None:
    """Samples of each class that has any, from the largest to the smallest."""
    ordered = np.sort(counts[counts > 0])[::-1]
    half = int(np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)) + 1
    ranks = np.arange(1, len(ordered) + 1)
    set_frame(axes, title)
    axes.fill_between(ranks, ordered, step="mid", alpha=0.2, linewidth=0)
    axes.step(ranks, ordered, where="mid")
    if ordered[0] >= _FAR_APART * ordered[-1]:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(0.7, 0.7 * ordered[-1]))
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(0.5, len(ordered) + 0.5)
    mark(axes, half)
    axes.set_xlabel(f"classes by size; the first {half:,} (dotted) hold half of all labels")
    axes.set_ylabel("samples")
    set_plain_ticks(axes.xaxis, axes.yaxis)


def _labels_chart(survey: Survey) -> Chart:
    text = f"Labels per sample: {survey.labels_mean:,.2f} on average, at most {survey.index.longest:,}"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        set_frame(axes, text)
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
        set_frame(axes, text)
        scale, unit = byte_unit(found["median"] * BLOCK)
        _distribution(axes, survey.blocks, BLOCK / scale, lambda value: bytes_text(value * scale))
        mark(axes, found["median"] * BLOCK / scale)
        axes.set_xlabel(f"{unit}; dotted: the median")

    return Chart(text, draw)


def _distribution(axes: Axes, counts: NDArray[np.int64], unit: float, text: Callable[[Any], str]) -> None:
    """A histogram of values, counts[k] of them k units; a long thin tail is a note in words."""
    [present] = np.nonzero(counts)
    low, high = int(present[0]), int(present[-1])
    below = np.cumsum(counts)
    shown = int(np.searchsorted(below, 0.995 * below[-1]))
    if high - low <= 2 * (shown - low) or high - low < _BINS:
        shown = high
    width = -(-(shown + 1 - low) // _BINS)
    edges = np.arange(low, shown + 1 + width, width)
    bins = np.diff(below[np.minimum(edges[1:], shown + 1) - 1], prepend=0)
    axes.stairs(bins, (edges - 0.5) * unit, fill=True, color=FILL)
    axes.set_xlim((edges[0] - 0.5 - width / 4) * unit, (edges[-1] - 0.5 + width / 4) * unit)
    axes.set_ylabel("samples")
    set_plain_ticks(axes.yaxis)
    if shown < high:
        beyond = (
            f"{100 * (1 - below[shown] / below[-1]):.2g} % above {text(shown * unit)}, the largest {text(high * unit)}"
        )
        axes.text(0.99, 0.97, beyond, transform=axes.transAxes, ha="right", va="top", fontsize=8)


def _sizes_chart(survey: Survey) -> Chart:
    """Width against height; the area of a point grows with the images that share the size."""
    unique, count = np.unique(survey.sizes, axis=0, return_counts=True)
    (left, bottom), (right, top) = unique.min(axis=0).tolist(), unique.max(axis=0).tolist()
    middle = " × ".join(f"{median:,.10g}" for median in np.median(survey.sizes, axis=0))
    text = f"Image sizes: widths {left:,} … {right:,}, heights {bottom:,} … {top:,}, median {middle}"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        set_frame(axes, text)
        areas = 10 + 250 * (count - 1) / len(survey.sizes)
        axes.scatter(unique[:, 0], unique[:, 1], s=areas, alpha=0.5, linewidth=0, zorder=3)
        if max(right / left, top / bottom) >= _FAR_APART:
            axes.set(xscale="log", yscale="log", xlim=(left / 1.3, 1.3 * right), ylim=(bottom / 1.3, 1.3 * top))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_minor_formatter(NullFormatter())
        else:
            axes.set(xlim=(0, 1.08 * right), ylim=(0, 1.08 * top))
        set_plain_ticks(axes.xaxis, axes.yaxis)
        square = [min(left, bottom) / 2, 2 * max(right, top)]
        axes.plot(square, square, color=GREY, linestyle=":", linewidth=0.8, scalex=False, scaley=False)
        axes.set_xlabel("width, pixels; dotted: squares")
        axes.set_ylabel("height, pixels")

    return Chart(text, draw)


def _shard_chart(survey: Survey) -> Chart:
    samples, size = spread(survey.shard_samples), spread(survey.shard_bytes)
    text = (
        f"{len(survey.shard_bytes):,} shards: {samples['min']:,} … {samples['max']:,} samples, "
        f"{bytes_text(size['min'])} … {bytes_text(size['max'])}"
    )

    def draw(figure: Figure) -> None:
        scale, unit = byte_unit(size["median"])
        above, below = figure.subplots(2, 1, sharex=True)
        set_frame(above, text)
        set_frame(below, "")
        edges = np.arange(len(survey.shard_bytes) + 1) - 0.5
        for axes, values in ((above, survey.shard_samples), (below, survey.shard_bytes / scale)):
            axes.stairs(values, edges, fill=True, color=FILL)
            axes.set_xlim(edges[0], edges[-1])
            axes.set_ylim(0, 1.08 * values.max())
        above.set_ylabel("samples")
        below.set_ylabel(unit)
        below.set_xlabel("shard")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        set_plain_ticks(below.xaxis, above.yaxis)

    return Chart(text, draw)
