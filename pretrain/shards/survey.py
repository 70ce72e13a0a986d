"""What an index tells about its shards: where one sample lies, and all of them in figures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from pretrain.console import isolated
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.index.indexfile import IndexFile, key_hash
from pretrain.index.tar import BLOCK, read_sample
from pretrain.progress import Progress
from pretrain.storage.filekind import IMAGE_SUFFIXES, image_kind
from pretrain.workers import in_threads

_ENDS_OF_HISTOGRAM = 5
_LARGEST_COUNTED = 1 << 20  # blocks: 512 MiB; larger samples are counted as of this size
AT_ONCE = 8  # images being read and decoded


def locate(index: Index, sample_id: int) -> dict[str, Any]:
    """Where the sample with a canonical id lies: {"id", "shard", "key", "offset", "bytes", "label"}; `label` is a list
    where labels are lists.

    `offset` is the byte of the sample's first header in the shard. Raises InputError for an id outside [0, N)
    and when the shard holds another sample there.
    """
    if not 0 <= sample_id < index.samples:
        raise InputError(f"id {sample_id} is out of range; this index has ids 0 … {index.samples - 1}")
    [extent] = index.extents([sample_id])
    key, _ = read_image(index, sample_id)
    labels = [label for label in index.labels([sample_id])[0].tolist() if label >= 0]
    return {
        "id": sample_id,
        "shard": extent.url,
        "key": key,
        "offset": extent.begin,
        "bytes": extent.end - extent.begin,
        "label": labels if index.multilabel else labels[0],
    }


def summary(index: Index) -> str:
    """The counts of an index in a line."""
    labels = f"lists of up to {index.longest} labels" if index.multilabel else "one label each"
    return f"{index.samples:,} samples, {index.num_classes:,} classes, {labels}; shards: {len(index.shards):,}"


@dataclass(frozen=True)
class SampledImage:
    """One image that was read and decoded; where that failed, `fault` says why and there is no size."""

    sample_id: int
    key: str
    width: int = 0
    height: int = 0
    format: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Survey:
    """All that was counted, as int64 arrays.

    `class_samples` [C] and `shard_samples`, `shard_bytes` [S]; `label_counts[k]` samples have k labels; `blocks[k]`
    samples take k blocks of 512 bytes in their shard, headers and padding included.
    """

    index: Index
    class_samples: NDArray[np.int64]
    label_counts: NDArray[np.int64]
    blocks: NDArray[np.int64]
    shard_samples: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    sampled: tuple[SampledImage, ...]

    @property
    def bytes(self) -> int:
        return int(self.shard_bytes.sum())

    @property
    def labels_mean(self) -> float:
        return float(self.class_samples.sum()) / self.index.samples

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(width, height) of the images that decode, int64 [n, 2]."""
        return np.array([(image.width, image.height) for image in self.sampled if not image.fault], np.int64).reshape(
            -1, 2
        )

    @property
    def formats(self) -> dict[str, int]:
        """How many images decode of each format and mode ("JPEG RGB"), the most frequent first."""
        return dict(Counter(image.format for image in self.sampled if not image.fault).most_common())

    @property
    def unreadable(self) -> list[SampledImage]:
        return [image for image in self.sampled if image.fault]

    def figures(self) -> dict[str, Any]:
        """The survey as JSON."""
        return {
            "samples": self.index.samples,
            "hash": self.index.hash,
            "content": {**self.index.content, "in_hash": not self.index.unhashed()},
            "bytes": self.bytes,
            "bytes_per_sample": round(self.bytes / self.index.samples),
            "sample_bytes": {name: value * BLOCK for name, value in spread_of_counts(self.blocks).items()},
            "shards": {
                "count": len(self.shard_bytes),
                "samples": spread(self.shard_samples),
                "bytes": spread(self.shard_bytes),
            },
            "labels": {
                "lists": self.index.multilabel,
                "per_sample_max": self.index.longest,
                "per_sample_mean": round(self.labels_mean, 4),
            },
            "classes": self._classes(),
            "images": self._images(),
        }

    def _classes(self) -> dict[str, Any]:
        counts = self.class_samples
        order = np.argsort(-counts, kind="stable").tolist()

        def rows(labels: list[int]) -> list[dict[str, Any]]:
            named = ((class_name(self.index, label), label) for label in labels)
            return [{"class": name, "label": label, "samples": int(counts[label])} for name, label in named]

        return {
            "count": len(counts),
            "empty": int((counts == 0).sum()),
            "samples": spread(counts),
            "most": rows(order[:_ENDS_OF_HISTOGRAM]),
            "fewest": rows(order[::-1][:_ENDS_OF_HISTOGRAM]),
        }

    def _images(self) -> dict[str, Any]:
        widths, heights = self.sizes.T
        unreadable = self.unreadable
        return {
            "read": len(self.sampled),
            "width": spread(widths),
            "height": spread(heights),
            "formats": self.formats,
            "unreadable": len(unreadable),
            "first_unreadable": self._first_unreadable(unreadable[0]) if unreadable else None,
        }

    def _first_unreadable(self, image: SampledImage) -> dict[str, Any]:
        [extent] = self.index.extents([image.sample_id])
        found = {"id": image.sample_id, "key": image.key, "shard": extent.url, "offset": extent.begin}
        return {**found, "error": image.fault}


def survey(index: Index, images: int = 1000) -> Survey:
    """Count an index's samples, bytes, classes and labels, and decode `images` images spread evenly over it.

    Everything but the images is read from the index alone, a few megabytes at a time. Images that do not decode are
    counted. Raises InputError for a shard that cannot be read or holds other samples than the index says.
    """
    return Survey(
        index=index,
        class_samples=index.histogram(),
        label_counts=_label_counts(index),
        blocks=_sum_counts(_blocks(file) for file in index.files),
        shard_samples=np.concatenate([np.diff(file.first) for file in index.files]),
        shard_bytes=np.concatenate([file.shard_bytes for file in index.files]),
        sampled=tuple(_sampled_images(index, spread_ids(index.samples, images))),
    )


def survey_text(figures: dict[str, Any]) -> str:
    """`Survey.figures` for reading."""
    shards, labels, classes, images = (figures[part] for part in ("shards", "labels", "classes", "images"))
    lines = [
        f"samples   {figures['samples']:,}",
        f"bytes     {figures['bytes']:,}, {figures['bytes_per_sample']:,} a sample",
        f"shards    {shards['count']:,}; samples {_range(shards['samples'])}; bytes {_range(shards['bytes'])}",
        f"labels    {'lists' if labels['lists'] else 'one a sample'}, mean {labels['per_sample_mean']}, most "
        f"{labels['per_sample_max']}",
        f"classes   {classes['count']:,}, {classes['empty']:,} of them empty; samples {_range(classes['samples'])}",
        *(
            f"  {end:<8}" + ", ".join(f"{isolated(row['class'])}: {row['samples']:,}" for row in classes[end])
            for end in ("most", "fewest")
        ),
        f"images    {images['read']:,} read; width {_range(images['width'])}, height {_range(images['height'])}",
        "  formats " + ", ".join(f"{name} {count:,}" for name, count in images["formats"].items()),
    ]
    if images["unreadable"]:
        lines.append(f"  {unreadable_text(images)}")
    content = ", ".join(
        f"{kind} of {figures['content'][kind]:,} shards"
        for kind in ("sha256", "etag", "unknown")
        if figures["content"][kind]
    )
    if not figures["content"]["in_hash"]:
        content += "; not all of it is in the hash: other images of the same sizes may have the same one"
    return "\n".join([*lines, f"content   {content}", f"hash      {figures['hash']}"])


def unreadable_text(images: dict[str, Any]) -> str:
    """The images that do not decode, in one sentence; `images` is that part of the figures."""
    first = images["first_unreadable"]
    return (
        f"unreadable {images['unreadable']:,} of {images['read']:,}; the first is id {first['id']}, key "
        f"{first['key']!r}, byte {first['offset']} of {first['shard']}: {first['error']}"
    )


def spread_ids(samples: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` of the ids 0 … samples−1 (at most all), ascending: one drawn at random from each of as many equal
    stretches, so that a period in the order of the samples does no harm.
    """
    bounds = np.arange(min(wanted, samples) + 1) * samples // min(wanted, samples)
    return np.random.default_rng(0).integers(bounds[:-1], bounds[1:])


def class_name(index: Index, label: int) -> str:
    names = index.classes or ()
    return names[label] if label < len(names) else str(label)


def read_image(index: Index, sample_id: int) -> tuple[str, bytes]:
    """(key, encoded image) of one sample. Raises InputError when its shard holds another one there."""
    [extent] = index.extents([sample_id])
    key, members = read_sample(extent)
    if key_hash(key) != int(index.key_hash([sample_id])[0]):
        raise InputError(
            f"{extent.url}: holds {key!r} at byte {extent.begin}, the index another key; index the shards again"
        )
    return key, next(members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members)


def spread(values: ArrayLike) -> dict[str, Any]:
    """{"min", "median", "max"}; zeros where there are no values."""
    array = np.asarray(values)
    if not array.size:
        return {"min": 0, "median": 0.0, "max": 0}
    return {"min": int(array.min()), "median": float(np.median(array)), "max": int(array.max())}


def spread_of_counts(counts: NDArray[np.int64]) -> dict[str, Any]:
    """`spread` of values of which k occurs counts[k] times."""
    [present] = np.nonzero(counts)
    below = np.cumsum(counts)
    middle = np.searchsorted(below, [(below[-1] - 1) // 2, below[-1] // 2], side="right")
    return {"min": int(present[0]), "median": float(middle.mean()), "max": int(present[-1])}


def _range(spread: dict[str, Any]) -> str:
    low, high = spread["min"], spread["max"]
    return f"{low:,}" if low == high else f"{low:,} … {high:,} (median {spread['median']:,})"


def _label_counts(index: Index) -> NDArray[np.int64]:
    return _sum_counts(
        _sum_counts(np.bincount(np.diff(piece)) for piece in file.pieces("label_starts", 1))
        if file.multilabel
        else np.array([0, file.samples])
        for file in index.files
    )


def _blocks(file: IndexFile) -> NDArray[np.int64]:
    """How many samples of one index file take k blocks: each ends at the next one, the last at its shard's end."""
    [held] = np.nonzero(np.diff(file.first))
    last = file.first[held + 1] - 1
    counts = _bincount(file, file.data_end[held] // BLOCK - file.offsets[last])
    row = 0
    for piece in file.pieces("offsets", 1):
        sizes = np.diff(piece.astype(np.int64))
        ends = last[np.searchsorted(last, row) : np.searchsorted(last, row + len(sizes))] - row
        counts = _sum_counts([counts, _bincount(file, np.delete(sizes, ends))])
        row += len(sizes)
    return counts


def _bincount(file: IndexFile, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    if sizes.min(initial=0) < 0:
        raise InputError(f"{file.path}: its offsets do not ascend: damaged; index the shards again")
    return np.bincount(np.minimum(sizes, _LARGEST_COUNTED))


def _sum_counts(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    total = np.zeros(0, np.int64)
    for part in parts:
        longer, shorter = (total, part) if len(total) >= len(part) else (part, total)
        total = longer.copy()
        total[: len(shorter)] += shorter
    return total


def _sampled_images(index: Index, ids: NDArray[np.int64]) -> Iterator[SampledImage]:
    with (
        Progress("decoding", "images", len(ids)) as progress,
        closing(in_threads(lambda number, _: _sampled_image(index, number), ids.tolist(), AT_ONCE)) as images,
    ):
        for image in images:
            yield image
            progress.advance()


def _sampled_image(index: Index, sample_id: int) -> SampledImage:
    # Here, because it brings torch, two seconds that `locate` can spare.
    from pretrain.images.decode import UnreadableImage, decode

    key, data = read_image(index, sample_id)
    try:
        _, height, width = decode(data, 3).shape
    except UnreadableImage as error:
        return SampledImage(sample_id, key, fault=str(error))
    return SampledImage(sample_id, key, width, height, _format(data))


def _format(data: bytes | memoryview) -> str:
    """Of an image that decodes: its format, and its colours where Pillow knows them."""
    from pretrain.images.decode import critical_chunks

    kind = image_kind(data)
    with suppress(Exception):  # it is choosier than the decoders
        image = Image.open(io.BytesIO(critical_chunks(data) if kind == "png" else data), formats=[kind])
        return f"{image.format} {image.mode}"
    return kind.upper()
