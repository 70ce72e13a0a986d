"""Rows of an index, of shards that need not be there."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.index.indexfile import IndexFile
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


def change_header(path: Path, **changes: Any) -> None:
    """Rewrite an index file's header, without a checksum, as the first indices were; None takes a key out."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[8:16], "little")
    begin = -(-(16 + length) // 64) * 64
    header = {**json.loads(whole[16 : 16 + length]), "crc32": None, **changes}
    text = json.dumps({key: value for key, value in header.items() if value is not None or key == "classes"}).encode()
    start = whole[:8] + len(text).to_bytes(8, "little") + text
    path.write_bytes(start + bytes(-len(start) % 64) + whole[begin:])


def as_first_version(path: Path) -> None:
    """Make of an index file what version 1 wrote: one hash, of the sequence of samples."""
    change_header(path, version=1, hash=IndexFile(path).sequence, sequence=None)
