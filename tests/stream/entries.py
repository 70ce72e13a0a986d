"""Rows of an index, of shards that need not be there."""

import zlib

import numpy as np

from pretrain.shards.indexwriter import ShardEntry


def entry(name, starts, data_end, labels, counts=None, first_key=0):
    """A row of the index for a shard whose samples begin at the 512-byte blocks `starts`."""
    keys = [zlib.crc32(f"k{first_key + number}".encode()) for number in range(len(starts))]
    return ShardEntry(
        url=name,
        bytes=data_end * 512 + 10240,
        data_end=data_end * 512,
        offsets=np.array(starts, np.uint32),
        key_hashes=np.array(keys, np.uint32),
        labels=np.array(labels, np.int32),
        label_counts=None if counts is None else np.array(counts, np.uint32),
        digest=f"sha256:{name}",
    )


SINGLE = [
    entry("a.tar", [0, 4, 9], 12, [3, 0, 7]),
    entry("b.tar", [2, 5], 8, [1, 1], first_key=3),
    entry("c.tar", [0, 3, 6, 9], 12, [2, 5, 5, 0], first_key=5),
]
LISTS = [entry("d.tar", [0, 6, 8], 11, [4, 9, 2, 11], counts=[2, 0, 2], first_key=9)]
