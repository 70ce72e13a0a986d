"""Mixup (Zhang et al. 2017, arXiv:1710.09412) of fixed pairs: slots 2k and 2k+1 of a batch mix with each other.

Pairs of neighbours, so that any even micro-batch holds whole pairs and the mixed batch is the same however it is cut.
Each row has a weight of its own, at least a half (as in big_vision: an image stays more itself than its partner), drawn
from (seed, epoch, sample id). Everything here runs on any device, without a synchronisation.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pretrain.errors import InputError
from pretrain.hashing import MIXUP, hash_words, stream64


def mix_weights(alpha: float, seed: int, epochs: ArrayLike, ids: ArrayLike) -> Tensor:
    """max(b, 1 − b), b ~ Beta(alpha, alpha), alpha > 0, for samples of epochs: epochs [m], ids [m] -> fp32 [m].

    Exact, from two uniform numbers and without rejection: Student's t by Bailey's polar method (1994) with 2·alpha
    degrees of freedom, t² = 2·alpha·s, makes b = (1 ± √(s / (1 + s))) / 2.
    """
    numbers = stream64(hash_words(MIXUP, seed, epochs, ids)[:, None], np.arange(2, dtype=np.uint64))
    radius, angle = ((numbers >> np.uint64(11)) + 0.5).T * 2.0**-53  # in (0, 1)
    with np.errstate(over="ignore"):  # a small alpha may reach infinity, and the weight 1
        s = np.expm1(-np.log(radius) / alpha) * np.cos(2 * np.pi * angle) ** 2
    return torch.from_numpy((0.5 + 0.5 / np.sqrt(1 + 1 / s)).astype(np.float32))


def keep_whole(weight: Tensor, valid: Tensor) -> Tensor:
    """`weight` [m], but 1 in every pair of which a row is not valid [m]: no grey image and no label of it mixes in."""
    return weight.where(valid & partners(valid), 1.0)


def mix_images(images: Tensor, weight: Tensor | None) -> Tensor:
    """w·x + (1 − w)·partner of every row: floating images [m, c, h, w], weight fp32 [m] -> as images.

    Without a weight the images as they are. Computed in fp32: bf16 weights would not be those of the loss.
    """
    if weight is None:
        return images
    mixed = torch.lerp(partners(images).float(), images.float(), weight[:, None, None, None])
    return mixed.to(images.dtype)


def partners(rows: Tensor) -> Tensor:
    """Rows 2k and 2k+1 exchanged: [m, …], m even -> the same shape."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def check_pairs(micro_batch: int) -> None:
    """Raise InputError for a micro-batch that cuts a pair."""
    if micro_batch % 2:
        raise InputError(
            f"data.mixup mixes neighbouring pairs, and a micro-batch of {micro_batch} images cuts one; set an even "
            "train.micro_batch, and a train.global_batch that gives every rank an even share"
        )
