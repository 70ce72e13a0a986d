"""A contact sheet: a few samples of an index, spread over its classes, small enough to be looked at together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pretrain.images.decode import UnreadableImage, decode
from pretrain.index.index import Index
from pretrain.shards.survey import AT_ONCE, class_name, read_image, spread_ids
from pretrain.workers import in_threads

SIDE = 160  # pixels, the longer side of a thumbnail; smaller images stay as they are
_CANDIDATES = 4096
_NAMED = 2  # labels of a list that are named


@dataclass(frozen=True)
class Tile:
    """One sample: its labels in words, and its image [h, w] RGB of at most SIDE a side; or why there is none."""

    sample_id: int
    caption: str
    image: Image.Image | None
    fault: str = ""


def contact_sheet(index: Index, tiles: int = 48) -> list[Tile]:
    """`tiles` samples by class and id. Raises InputError for a shard that cannot be read."""
    ids = choose(index, tiles)
    return list(in_threads(lambda sample_id, _: _tile(index, sample_id), ids.tolist(), AT_ONCE))


def choose(index: Index, tiles: int) -> NDArray[np.int64]:
    """Up to `tiles` ids, by class (the first label) and id: of every class about as many; of more classes than
    tiles, classes spread evenly.

    Rare classes are found among 4,096 samples drawn over the whole index, not in all of it.
    """
    # Shuffled: what is taken of a class is not its first, but from anywhere.
    ids = np.random.default_rng(1).permutation(spread_ids(index.samples, max(tiles, _CANDIDATES)))
    labels = index.labels(ids)[:, :1].sum(axis=1)  # a sum, because there is no first column where all lists are empty
    classes = np.unique(labels)
    shown = classes[np.linspace(0, len(classes) - 1, min(tiles, len(classes))).round().astype(int)]
    ids, labels = (array[np.isin(labels, shown)] for array in (ids, labels))
    by_class = np.argsort(labels, kind="stable")
    ids, labels = ids[by_class], labels[by_class]
    turn = np.arange(len(ids)) - np.searchsorted(labels, labels)  # the how-manieth of its class
    taken = np.argsort(turn, kind="stable")[:tiles]
    return ids[taken[np.lexsort((ids[taken], labels[taken]))]]


def _tile(index: Index, sample_id: int) -> Tile:
    labels = [label for label in index.labels([sample_id])[0].tolist() if label >= 0]
    caption = ", ".join(class_name(index, label) for label in labels[:_NAMED]) or "no label"
    if len(labels) > _NAMED:
        caption += f" +{len(labels) - _NAMED}"
    _, data = read_image(index, sample_id)
    try:
        image = Image.fromarray(decode(data, 3).permute(1, 2, 0).contiguous().numpy())
    except UnreadableImage as error:
        return Tile(sample_id, caption, None, str(error))
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Tile(sample_id, caption, image)
