"""The two losses, as a sum over the images that could be read, divided by all images of the micro-batch.

Divided by the batch and not by the readable images, so that the sum over ranks and micro-batches is the same function
of the global batch however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import InputError

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def multi_hot(labels: Tensor, classes: int) -> Tensor:
    """labels [b, l], padded with −1 → float 0/1 targets [b, k]."""
    targets = torch.zeros(len(labels), classes + 1, device=labels.device)
    targets.scatter_(1, labels.where(labels >= 0, classes), 1.0)  # padding falls into a column of its own
    return targets[:, :classes]


def sigmoid_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy summed over classes: logits [b, k], labels [b, l] padded with −1, valid [b] → scalar.

    The loss of the paper's JFT and ImageNet-21k pre-training, according to its authors.
    """
    each = F.binary_cross_entropy_with_logits(logits.float(), multi_hot(labels, logits.shape[1]), reduction="none")
    return (each.sum(dim=1) * valid).sum() / len(logits)


def softmax_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy: logits [b, k], labels [b, 1], valid [b] → scalar."""
    each = F.cross_entropy(logits.float(), labels[:, 0], reduction="none", ignore_index=-1)
    return (each * valid).sum() / len(logits)


def choose_loss(name: Literal["sigmoid", "softmax"], multilabel: bool) -> Loss:
    """The loss that `train.loss` names.

    Raises:
        InputError: softmax over samples with several labels.
    """
    if name == "softmax" and multilabel:
        raise InputError("train.loss: softmax takes one label a sample, and the index holds label lists; set sigmoid")
    return sigmoid_loss if name == "sigmoid" else softmax_loss
