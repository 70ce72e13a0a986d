"""What an index tells of its shards: one sample's place, or the whole in figures."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

from pretrain.errors import InputError
from pretrain.stream.index import Index
from pretrain.stream.indexfile import key_hash
from pretrain.stream.tar import IMAGE_SUFFIXES, read_sample

_ENDS_OF_HISTOGRAM = 5


def locate(index: Index, sample_id: int) -> dict[str, Any]:
    """Where canonical id u lies: {"id", "shard", "key", "offset", "bytes", "label"}; `label` is a list where
    labels are.

    `offset` is the byte of the sample's first header in the shard. Raises InputError for an id outside [0, N)
    and when the shard holds another sample there.
    """
    if not 0 <= sample_id < index.samples:
        raise InputError(f"id {sample_id} is out of range; this index has ids 0 … {index.samples - 1}")
    [extent] = index.extents([sample_id])
    key, _ = _read(index, sample_id)
    labels = [label for label in index.labels([sample_id])[0].tolist() if label >= 0]
    return {
        "id": sample_id,
        "shard": extent.url,
        "key": key,
        "offset": extent.begin,
        "bytes": extent.end - extent.begin,
        "label": labels if index.multilabel else labels[0],
    }


def survey(index: Index, images: int = 1000) -> dict[str, Any]:
    """Figures of an index: samples, bytes, classes, labels, and the sizes of `images` images spread evenly
    over it.

    All but the images comes from the index alone. Raises InputError for a sample that cannot be read.
    """
    shards = list(index.shards)
    size = sum(shard.bytes for shard in shards)
    return {
        "samples": index.samples,
        "hash": index.hash,
        "bytes": size,
        "bytes_per_sample": round(size / index.samples),
        "shards": {
            "count": len(shards),
            "samples": _spread([shard.samples for shard in shards]),
            "bytes": _spread([shard.bytes for shard in shards]),
        },
        "labels": {"lists": index.multilabel, "per_sample_max": index.longest, **_label_mean(index)},
        "classes": _classes(index),
        "images": _images(index, images),
    }


def survey_text(figures: dict[str, Any]) -> str:
    """`survey` for reading."""
    shards, labels, classes, images = (figures[part] for part in ("shards", "labels", "classes", "images"))
    lines = [
        f"samples   {figures['samples']:,}",
        f"bytes     {figures['bytes']:,}, {figures['bytes_per_sample']:,} a sample",
        f"shards    {shards['count']:,}; samples {_range(shards['samples'])}; bytes {_range(shards['bytes'])}",
        f"labels    {'lists' if labels['lists'] else 'one a sample'}, mean {labels['per_sample_mean']}, most "
        f"{labels['per_sample_max']}",
        f"classes   {classes['count']:,}, {classes['empty']:,} of them empty; samples {_range(classes['samples'])}",
        *(
            f"  {end:<8}" + ", ".join(f"{row['class']}: {row['samples']:,}" for row in classes[end])
            for end in ("most", "fewest")
        ),
        f"images    {images['read']:,} read; width {_range(images['width'])}, height {_range(images['height'])}",
        "  formats " + ", ".join(f"{name} {count:,}" for name, count in images["formats"].items()),
        f"hash      {figures['hash']}",
    ]
    return "\n".join(lines)


def _range(spread: dict[str, Any]) -> str:
    low, high = spread["min"], spread["max"]
    return f"{low:,}" if low == high else f"{low:,} … {high:,} (median {spread['median']:,})"


def _spread(values: Any) -> dict[str, Any]:
    array = np.asarray(values)
    return {"min": int(array.min()), "median": float(np.median(array)), "max": int(array.max())}


def _label_mean(index: Index) -> dict[str, float]:
    return {"per_sample_mean": round(sum(len(file.labels) for file in index.files) / index.samples, 4)}


def _classes(index: Index) -> dict[str, Any]:
    counts = index.histogram()
    if not len(counts):
        return {"count": 0, "empty": 0, "samples": _spread([0]), "most": [], "fewest": []}
    order = np.argsort(-counts, kind="stable").tolist()

    def rows(labels: list[int]) -> list[dict[str, Any]]:
        names = index.classes
        return [
            {"class": names[label] if names else str(label), "label": label, "samples": int(counts[label])}
            for label in labels
        ]

    return {
        "count": len(counts),
        "empty": int((counts == 0).sum()),
        "samples": _spread(counts),
        "most": rows(order[:_ENDS_OF_HISTOGRAM]),
        "fewest": rows(order[::-1][:_ENDS_OF_HISTOGRAM]),
    }


def _images(index: Index, wanted: int) -> dict[str, Any]:
    ids = np.unique(np.linspace(0, index.samples - 1, max(1, min(wanted, index.samples))).astype(np.int64))
    formats: Counter[str] = Counter()
    sizes = []
    for sample_id in ids.tolist():
        key, members = _read(index, sample_id)
        suffix = next(suffix for suffix in IMAGE_SUFFIXES if suffix in members)
        try:
            image = Image.open(io.BytesIO(members[suffix]))
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"id {sample_id}, key {key!r}: .{suffix} is not a readable image") from error
        formats[f"{image.format} {image.mode}"] += 1
        sizes.append(image.size)
    widths, heights = zip(*sizes, strict=True)
    return {
        "read": len(ids),
        "width": _spread(widths),
        "height": _spread(heights),
        "formats": dict(formats.most_common()),
    }


def _read(index: Index, sample_id: int) -> tuple[str, dict[str, bytes]]:
    [extent] = index.extents([sample_id])
    key, members = read_sample(extent.url, extent.begin, extent.end)
    if key_hash(key) != int(index.key_hash([sample_id])[0]):
        raise InputError(
            f"{extent.url}: holds {key!r} at byte {extent.begin}, the index another key; index the shards again"
        )
    return key, members
