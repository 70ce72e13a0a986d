"""Indices of 3·10⁸ samples: of megabytes, whose every shard is the same file; and whole, of shards that are nowhere."""

import json
import os
from pathlib import Path

import numpy as np

from pretrain.index.index import Index
from pretrain.index.indexfile import INDEX_NAME, place_arrays
from pretrain.index.tar import BLOCK
from pretrain.shards.indexwriter import IndexWriter, ShardEntry
from pretrain.stream.order import Order


def write_vast_index(folder: Path, shards: Path, samples: int, used: np.ndarray) -> Path:
    """List the first shard of `shards` until there are `samples`, a multiple of those it holds.

    Only the entries of the ids in `used` are filled in, the others are a hole in the file.
    """
    real = Index.open(shards).files[0]
    each = int(real.first[1])
    count, rest = divmod(samples, each)
    assert not rest, f"{samples} is no multiple of {each}"
    name = os.path.relpath(real.shard_url(0), folder).encode()
    arrays = {
        "first": np.arange(count + 1) * each,
        "shard_bytes": np.full(count, real.shard_bytes[0]),
        "data_end": np.full(count, real.data_end[0]),
        "url_ends": np.arange(count + 1) * len(name),
        "urls": np.frombuffer(name * count, "u1"),
        "digest_ends": np.zeros(count + 1, "<i8"),
        "digests": np.zeros(0, "u1"),
    }
    columns = {"offsets": real.offsets, "key_hashes": real.key_hashes, "labels": real.labels}
    lengths = {key: (array.dtype.str, len(array)) for key, array in arrays.items()}
    lengths |= {key: (array.dtype.str, samples) for key, array in columns.items()}
    header = {"version": 1, "samples": samples, "shards": count, "num_classes": 10, "multilabel": False}
    header |= {"longest": 1, "classes": None, "hash": "0" * 64}
    start, size = place_arrays(header, lengths)
    table = json.loads(start[16:].rstrip(b"\0"))["arrays"]
    path = folder / INDEX_NAME
    path.write_bytes(start)
    os.truncate(path, size)
    for key, array in arrays.items():
        if len(array):
            np.memmap(path, array.dtype, "r+", len(start) + table[key][2], array.shape)[:] = array
    for key, array in columns.items():
        np.memmap(path, array.dtype, "r+", len(start) + table[key][2], (samples,))[used] = array[used % each]
    return path


def ids_near(order: Order, step: int, rank: int, world: int, steps: int = 96) -> np.ndarray:
    """The samples of all chunks that a rank reads from in the `steps` after `step`, each with the one behind it."""
    share = order.global_batch // world
    slots = [order.ids(at, rank * share, (rank + 1) * share) for at in range(step, step + steps)]
    chunks = np.unique(np.concatenate(slots) // order.chunk)
    ids = chunks[:, None] * order.chunk + np.arange(order.chunk + 1)  # where a chunk ends, the next sample tells
    return ids[ids < order.samples]


def write_whole_index(path: Path, samples: int, shard: int = 10_000, mean_bytes: int = 110_000) -> Path:
    """An index of `samples` JPEGs in an object store, written as `shards.py index` writes it: every entry is there.

    Sizes are log-normal about `mean_bytes` (σ = 0.5), labels and keys drawn; one in 64 shards has offsets of its own.
    """
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(np.log(mean_bytes) - 0.125, 0.5, (64, shard)))
    blocks = np.ceil(sizes / BLOCK).astype(np.int64) + 1 + 2  # with its header; its label and that one's header
    ends = blocks.cumsum(axis=1)
    with IndexWriter(path) as writer:
        for number in range(-(-samples // shard)):
            count = min(shard, samples - number * shard)
            offsets = np.concatenate([[0], ends[number % 64, : count - 1]]).astype(np.uint32)
            data_end = int(ends[number % 64, count - 1]) * BLOCK
            writer.add(
                ShardEntry(
                    url=f"s3://bucket/train/{number:05d}.tar",
                    bytes=data_end + 2 * BLOCK,
                    data_end=data_end,
                    offsets=offsets,
                    key_hashes=rng.integers(0, 1 << 32, count, np.uint32),
                    labels=rng.integers(0, 18_291, count, np.int32),
                    digest=f"sha256:{number:064x}",
                )
            )
        writer.finish()
    return path
