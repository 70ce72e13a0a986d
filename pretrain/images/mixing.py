"""Mixing the images of fixed pairs: slots 2k and 2k+1 of a batch, each with the other.

Mixup (Zhang et al. 2017, arXiv:1710.09412) averages the two; each row has a weight of its own, at least a half (as in
big_vision: an image stays more itself than its partner). CutMix (Yun et al. 2019, arXiv:1905.04899) pastes a box of the
partner into the row; the row's weight is the area that is left of it. Labels are mixed by the same weight.

Pairs of neighbours, so that any even micro-batch holds whole pairs and the mixed batch is the same however it is cut.
All is drawn from (seed, epoch, sample id). Mixing itself runs on any device, without a synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pretrain.errors import InputError
from pretrain.hashing import CUTMIX, MIXUP, PAIRS, hash_words, stream64


@dataclass(frozen=True)
class Mixing:
    """How pairs are mixed: the α of mixup's and of CutMix's Beta(α, α), 0 for none; not both 0.

    With both, a coin decides for each pair, drawn for its first sample.
    """

    mixup: float
    cutmix: float
    image_size: int
    seed: int

    def draw(self, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """For the samples of whole pairs, epochs [m], ids [m] -> weight fp32 [m], boxes int64 [m, 4].

        The boxes are those of `cut_boxes`, empty in rows that mixup mixes; None without CutMix.
        """
        if not self.cutmix:
            return mix_weights(self.mixup, self.seed, epochs, ids), None
        boxes = cut_boxes(self.cutmix, self.image_size, self.seed, epochs, ids)
        if not self.mixup:
            return uncut(boxes, self.image_size), boxes
        (coin,) = _uniform(PAIRS, self.seed, epochs[::2], ids[::2], 1)
        cut = torch.from_numpy(coin < 0.5).repeat_interleave(2)
        weight = uncut(boxes, self.image_size).where(cut, mix_weights(self.mixup, self.seed, epochs, ids))
        return weight, boxes * cut[:, None]


def mix_weights(alpha: float, seed: int, epochs: ArrayLike, ids: ArrayLike) -> Tensor:
    """Mixup's: max(b, 1 − b), b ~ Beta(alpha, alpha), alpha > 0: epochs [m], ids [m] -> fp32 [m]."""
    return torch.from_numpy((0.5 + abs(_beta(alpha, *_uniform(MIXUP, seed, epochs, ids, 2)))).astype(np.float32))


def cut_boxes(alpha: float, image_size: int, seed: int, epochs: ArrayLike, ids: ArrayLike) -> Tensor:
    """What CutMix takes from the partner: epochs [m], ids [m] -> int64 [m, 4].

    Each box is rows from top to below bottom and columns from left to below right, (top, bottom, left, right): a square
    around a pixel of the image, of 1 − λ of its area, λ ~ Beta(alpha, alpha), clipped at the border.
    """
    *two, row, column = _uniform(CUTMIX, seed, epochs, ids, 4)
    side = np.rint(image_size * np.sqrt(0.5 - _beta(alpha, *two)))  # 1 − λ = ½ − (λ − ½)
    first = np.floor(np.stack([row, column], 1) * image_size) - side[:, None] // 2  # [m, 2]
    edges = np.stack([first, first + side[:, None]], 2).clip(0, image_size)  # [m, 2, 2]
    return torch.from_numpy(edges.astype(np.int64)).flatten(1)


def uncut(boxes: Tensor, image_size: int) -> Tensor:
    """The share of an image outside its box: [m, 4] -> fp32 [m]."""
    top, bottom, left, right = boxes.unbind(1)
    return 1 - ((bottom - top) * (right - left)).float() / image_size**2


def _uniform(purpose: int, seed: int, epochs: ArrayLike, ids: ArrayLike, count: int) -> NDArray[np.float64]:
    """`count` numbers in (0, 1) for each sample: epochs [m], ids [m] -> [count, m]."""
    numbers = stream64(hash_words(purpose, seed, epochs, ids)[:, None], np.arange(count, dtype=np.uint64))
    uniform: NDArray[np.float64] = ((numbers >> np.uint64(11)) + 0.5).T * 2.0**-53
    return uniform


def _beta(alpha: float, radius: NDArray[np.float64], angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """b − ½, b ~ Beta(alpha, alpha), alpha > 0, of uniform numbers in (0, 1): [m], [m] -> [m].

    Exact and without rejection: Student's t by Bailey's polar method (1994) with 2·alpha degrees of freedom,
    t² = 2·alpha·s, makes b = (1 ± √(s / (1 + s))) / 2.
    """
    cosine = np.cos(2 * np.pi * angle)
    with np.errstate(over="ignore"):  # a small alpha may reach infinity, and b an end
        s = np.expm1(-np.log(radius) / alpha) * cosine**2
    return np.copysign(0.5 / np.sqrt(1 + 1 / s), cosine)


def keep_whole(weight: Tensor, boxes: Tensor | None, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """`weight` [m], but 1, and `boxes` [m, 4], but empty, in every pair of which a row is not valid [m].

    So no grey image and no label of it mixes in.
    """
    both = valid & partners(valid)
    return weight.where(both, 1.0), None if boxes is None else boxes * both[:, None]


def mix_images(images: Tensor, weight: Tensor | None, boxes: Tensor | None = None) -> Tensor:
    """Every row mixed with its partner: floating images [m, c, h, w], weight fp32 [m], boxes [m, 4] -> as images.

    With an empty box, or without boxes, w·x + (1 − w)·partner; otherwise x, and the partner inside the box. Without a
    weight the images as they are. Computed in fp32: bf16 weights would not be those of the loss.
    """
    if weight is None:
        return images
    own = weight[:, None, None, None]  # of each pixel
    if boxes is not None:
        own = _pixel_weights(own, boxes, images.shape[-1])
    mixed = torch.lerp(partners(images).float(), images.float(), own)
    return mixed.to(images.dtype)


def _pixel_weights(weight: Tensor, boxes: Tensor, size: int) -> Tensor:
    """A row's own share of each of its pixels: weight [m, 1, 1, 1], boxes [m, 4] -> [m, 1, size, size]."""
    top, bottom, left, right = boxes[:, :, None, None, None].unbind(1)
    along = torch.arange(size, device=boxes.device)
    inside = (along[:, None] >= top) & (along[:, None] < bottom) & (along >= left) & (along < right)
    return weight.where(bottom == top, 1.0).where(~inside, 0.0)


def partners(rows: Tensor) -> Tensor:
    """Rows 2k and 2k+1 exchanged: [m, …], m even -> the same shape."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def check_pairs(micro_batch: int) -> None:
    """Raise InputError for a micro-batch that cuts a pair."""
    if micro_batch % 2:
        raise InputError(
            f"data.mixup and data.cutmix mix neighbouring pairs, and a micro-batch of {micro_batch} images cuts one; "
            "set an even train.micro_batch, and a train.global_batch that gives every rank an even share"
        )
