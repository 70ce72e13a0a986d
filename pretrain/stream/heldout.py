"""Which samples are held out of training: a share of them, chosen by their keys alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import InputError
from pretrain.hashing import HELD_OUT, hash_words
from pretrain.index.index import Index

Ids = NDArray[np.int64]


def hold_out(index: Index, share: float) -> tuple[Ids, Ids]:
    """The canonical ids that are trained on, and those held out: int64, ascending; together all of the index.

    A sample is held out where the hash of its key is below `share`, so the choice depends on no seed, no order and no
    other sample, a larger share holds out all that a smaller one does, and equal keys share their fate. Takes 8 bytes
    of memory a sample, and some 50 while it chooses.

    Raises:
        InputError: nothing is held out, or everything.
    """
    keys = index.key_hash(np.arange(index.samples))
    chosen = hash_words(HELD_OUT, keys) < np.uint64(share * 2.0**64)
    trained, held = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    if not len(held) or not len(trained):
        which, right = ("none", "larger") if not len(held) else ("all", "smaller")
        raise InputError(
            f"data.held_out: {share:g} of the {index.samples:,} samples of data.train holds out {which} of them; a "
            f"{right} share would be right, or 0"
        )
    return trained, held
