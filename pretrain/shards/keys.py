"""Keys that occur in two shards of an index: found by their hashes, then read and named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pretrain.errors import InputError
from pretrain.index.indexfile import key_bytes
from pretrain.index.tar import BLOCK, ShardTar
from pretrain.shards.column import Column
from pretrain.storage.shardfile import open_shard


def wide_hash(key: str) -> int:
    """64 bits of a key: equal ones make it likely that two keys are equal; only the keys themselves prove it."""
    return int.from_bytes(hashlib.blake2b(key_bytes(key), digest_size=8).digest(), "little")


class KeyHashes:
    """Wide hashes of all keys, shard by shard, in temporary files in `folder` (default: TMPDIR).

    They take 16 bytes a sample while `refuse_shared` sorts; memory does not grow with the samples.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._hashes = Column("<u8", folder)
        self._first = [0]

    def add(self, hashes: np.ndarray) -> None:
        """The hashes of the next shard, uint64 [n]."""
        self._hashes.append(hashes)
        self._first.append(len(self._hashes))

    def refuse_shared(self, shards: Sequence[str], offsets: np.ndarray) -> None:
        """Raise InputError when one key occurs in two of `shards`, which are read where hashes are equal.

        `offsets` tell where all samples begin, in blocks of 512 bytes.
        """
        for suspect in self._suspects():
            seen: dict[str, str] = {}
            for position in self._positions(suspect):
                shard = int(np.searchsorted(self._first, position, side="right")) - 1
                begin = int(offsets[position]) * BLOCK
                key = _key_at(shards[shard], begin)
                if key in seen:
                    raise InputError(
                        f"{shards[shard]}: key {key!r} at byte {begin} also occurs in {seen[key]}; keys are "
                        "unique over all shards of an index"
                    )
                seen[key] = shards[shard]

    def _suspects(self) -> Iterator[int]:
        """Hashes that occur more than once, ascending."""
        ordered = Column("<u8", self._folder)
        try:
            for piece in self._hashes.pieces():
                ordered.append(piece)
            ordered.array().sort()
            last = None
            for piece in ordered.pieces(overlap=1):
                for suspect in np.unique(piece[1:][piece[1:] == piece[:-1]]).tolist():
                    if suspect != last:
                        yield suspect
                    last = suspect
        finally:
            ordered.close()

    def _positions(self, suspect: int) -> Iterator[int]:
        begin = 0
        for piece in self._hashes.pieces():
            yield from (begin + np.flatnonzero(piece == np.uint64(suspect))).tolist()
            begin += len(piece)

    def __enter__(self) -> KeyHashes:
        return self

    def __exit__(self, *error: object) -> None:
        self._hashes.close()


def _key_at(url: str, begin: int) -> str:
    with open_shard(url) as file:
        return next(sample.key for sample in ShardTar(file, url).samples() if sample.begin == begin)
