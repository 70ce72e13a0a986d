"""Whether an index's images are in colour, which an index does not record: some of them are read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from pretrain.images.decode import UnreadableImage, decode
from pretrain.index.index import Index
from pretrain.storage.retry import TIMEOUTS, Timeouts
from pretrain.storage.shardfile import ShardReader
from pretrain.stream.chunk import Chunk
from pretrain.stream.counters import Counters
from pretrain.stream.fault import ChunkError

_LOOKED_AT = 16
_SECONDS = 10.0  # for storage to answer: a start is not held up for a note
_TINT = 8  # levels between the channels of one pixel that a lossy grey image may have


def colour_text(channels: int, index: Index, key: str, timeouts: Timeouts | None = None) -> str:
    """In words, how the images of `index`, of the config key `key`, do not fit a network of `channels`; else empty."""
    coloured, seen = count_coloured(index, timeouts)
    if channels == 1 and coloured:
        return (
            f"model.channels: the network takes grey images, and {coloured} of {seen} images looked at in {key} are in "
            "colour, which is dropped; a network of 3 channels would be right for these data"
        )
    if channels == 3 and seen and not coloured:
        return (
            f"model.channels: the network takes RGB images, and none of {seen} images looked at in {key} is in colour: "
            "all three channels are the same; one would do"
        )
    return ""


def count_coloured(index: Index, timeouts: Timeouts | None = None) -> tuple[int, int]:
    """Of some images spread over the index: how many have coloured pixels, and how many could be read."""
    timeouts = timeouts or TIMEOUTS
    timeouts = replace(timeouts, stall=min(timeouts.stall, _SECONDS), deadline=min(timeouts.deadline, _SECONDS))
    ids = np.unique(np.linspace(0, index.samples - 1, _LOOKED_AT).astype(np.int64)).tolist()
    reader = ShardReader(timeouts)
    with ThreadPoolExecutor(len(ids)) as threads:
        seen = [found for found in threads.map(partial(_coloured, index, reader), ids) if found is not None]
    return sum(seen), len(seen)


def _coloured(index: Index, reader: ShardReader, sample_id: int) -> bool | None:
    chunk = Chunk(np.array([sample_id]))
    chunk.locate(index, reader)
    chunk.read(Counters())
    try:
        pixels = decode(chunk.take(sample_id)[1], 3)
    except (ChunkError, UnreadableImage):
        return None
    return bool((pixels.amax(dim=0) - pixels.amin(dim=0)).max() > _TINT)
