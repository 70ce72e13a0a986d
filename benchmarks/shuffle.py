"""How evenly streams mix classes: χ² per degree of freedom of the class counts in windows of batches; 1 is chance.

The worst layout there is: a class to a shard, as when a sorted data set was sharded in its order.
"""

import importlib.util
import itertools
import random
from collections.abc import Iterator

import numpy as np
import webdataset
from numpy.typing import NDArray

from pretrain.stream.order import Order

SAMPLES, SHARD, BATCH = 600_000, 1_000, 256
SHARDS = SAMPLES // SHARD
WINDOWS = (1, 16, 128)  # batches

Labels = NDArray[np.int64]


def streams() -> Iterator[tuple[str, Labels]]:
    """(name, classes in the order of one epoch's batches), one after the other."""
    order = Order(SAMPLES, BATCH, seed=0)
    yield "vit-foundry, as it comes", order.at(np.arange(SAMPLES)) // SHARD
    yield "vit-foundry, chunk 1", Order(SAMPLES, BATCH, seed=0, chunk=1).at(np.arange(SAMPLES)) // SHARD
    yield "one permutation of the epoch", np.random.default_rng(0).permutation(SAMPLES) // SHARD
    yield "webdataset, 32 workers × shuffle(5000)", _webdataset(32, 5000)
    if importlib.util.find_spec("streaming"):
        yield "MosaicML py1e, 8 workers", _mosaic("py1e", 8)


def unevenness(classes: Labels, window: int) -> float:
    """χ²/df of class counts against equal shares, the mean over windows of `window` batches end to end."""
    size = window * BATCH
    count = len(classes) // size
    cells = np.arange(count).repeat(size) * SHARDS + classes[: count * size]
    counts = np.bincount(cells, minlength=count * SHARDS).reshape(count, SHARDS)
    share = size / SHARDS
    return float(((counts - share) ** 2 / share).sum(axis=1).mean() / (SHARDS - 1))


def _webdataset(workers: int, buffer: int) -> Labels:
    """Shards shuffled and dealt to the workers, each with a shuffle buffer; a batch from each worker in turn."""
    shards = np.random.default_rng(0).permutation(SHARDS)
    queues = []
    for worker in range(workers):
        labels = itertools.chain.from_iterable([int(shard)] * SHARD for shard in shards[worker::workers])
        queues.append(np.fromiter(webdataset.shuffle(buffer, rng=random.Random(worker))(labels), np.int64))
    turns = min(map(len, queues)) // BATCH
    return np.stack([queue[: turns * BATCH].reshape(turns, BATCH) for queue in queues], axis=1).ravel()


def _mosaic(algorithm: str, workers: int) -> Labels:
    """One node and rank, with the defaults of StreamingDataset; a batch from each worker in turn."""
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    nodes, block = 1, 4_000_000
    parts = get_partitions("relaxed", SAMPLES, nodes, 1, 1, workers, BATCH)  # [1, 1, workers, batches, batch]
    order = get_shuffle(algorithm, np.full(SHARDS, SHARD), nodes, 0, 0, block)
    places = parts[0, 0].swapaxes(0, 1).ravel()
    return order[places[places >= 0]] // SHARD
