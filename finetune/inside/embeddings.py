"""What the embeddings of a network have learned: its filters for patches, and its positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.model.positions import sincos2d
from pretrain.model.spec import ViTSpec

COMPONENTS = 28  # as in the paper's Figure 7


@dataclass(frozen=True)
class Components:
    """The first k principal components of a patch embedding's filters.

    filters: float64 [k, c, p, p], each of length 1 and with its largest value positive.
    explained: float64 [k], the share of the filters' variance that each explains, descending.
    """

    filters: Tensor
    explained: Tensor


def principal_components(weight: Tensor, most: int = COMPONENTS) -> Components:
    """Of a patch convolution's `weight` [d, c, p, p]: d filters, their mean taken away. At most c·p² components, and
    d - 1.
    """
    centred = weight.double().flatten(1)
    centred = centred - centred.mean(dim=0)
    _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    count = min(most, len(weight) - 1, centred.shape[1])
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    filters = (directions * largest.sign()).unflatten(1, weight.shape[1:])
    return Components(filters, (scales.square() / scales.square().sum())[:count])


def position_similarity(spec: ViTSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """Cosine similarity of every patch's position embedding with every other's, float64 [g, g, g, g]: row and column of
    one patch, then of the other. Fixed positions are computed; the class token's slot is left out.
    """
    if spec.positions == "learned":
        positions = tensors["position_embedding"][0, -(spec.grid**2) :]  # the patches' come last
    else:
        positions = sincos2d(spec.grid, spec.width, device=torch.device("cpu"), dtype=torch.float32)[0]
    directions = F.normalize(positions.double(), dim=1)
    return (directions @ directions.T).reshape([spec.grid] * 4)
