"""The two losses, as a sum over the images that could be read, divided by all images of the micro-batch.

Divided by the batch and not by the readable images, so that the sum over ranks and micro-batches is the same function
of the global batch however it is cut.

Both are linear in the target. So the loss of a mixed image is its weight times the loss of its own labels, and the rest
times that of its partner's; label smoothing ε makes the target (1 − ε)·target + ε / classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import InputError
from pretrain.images.mixing import partners


class Loss(Protocol):
    """Logits [b, k], labels [b, l], valid [b], weight [b] of mixed rows (None: nothing is mixed) → scalar."""

    def __call__(self, logits: Tensor, labels: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor: ...


def multi_hot(labels: Tensor, classes: int) -> Tensor:
    """labels [b, l], padded with −1 → float 0/1 targets [b, k]."""
    targets = torch.zeros(len(labels), classes + 1, device=labels.device)
    targets.scatter_(1, labels.where(labels >= 0, classes), 1.0)  # padding falls into a column of its own
    return targets[:, :classes]


def sigmoid_loss(
    logits: Tensor, labels: Tensor, valid: Tensor, weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Binary cross-entropy summed over classes: logits [b, k], labels [b, l] padded with −1, valid [b] → scalar.

    The loss of the paper's JFT and ImageNet-21k pre-training, according to its authors.
    """

    def rows(labels: Tensor) -> Tensor:
        targets = multi_hot(labels, logits.shape[1]) * (1 - smoothing) + smoothing / logits.shape[1]
        return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").sum(dim=1)

    return _batch_mean(rows, labels, valid, weight)


def softmax_loss(
    logits: Tensor, labels: Tensor, valid: Tensor, weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy: logits [b, k], labels [b, 1], valid [b] → scalar."""

    def rows(labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.float(), labels[:, 0], reduction="none", ignore_index=-1, label_smoothing=smoothing
        )

    return _batch_mean(rows, labels, valid, weight)


def _batch_mean(rows: Callable[[Tensor], Tensor], labels: Tensor, valid: Tensor, weight: Tensor | None) -> Tensor:
    each = rows(labels)
    if weight is not None:
        each = weight * each + (1 - weight) * rows(partners(labels))
    return (each * valid).sum() / len(labels)


def choose_loss(name: Literal["sigmoid", "softmax"], one_label: bool, smoothing: float = 0.0) -> Loss:
    """The loss that `train.loss` names, its targets smoothed by `train.label_smoothing`.

    one_label: whether every sample has exactly one label.

    Raises:
        InputError: softmax over samples with several labels, or with none.
    """
    if name == "softmax" and not one_label:
        raise InputError(
            "train.loss: softmax takes exactly one label a sample, and the index holds lists of several, or of none; "
            "set train.loss=sigmoid"
        )
    return partial(sigmoid_loss if name == "sigmoid" else softmax_loss, smoothing=smoothing)
