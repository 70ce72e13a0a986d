"""big_vision's `.npz`: modules numbered by class, no position for the class token, maybe positions that are fixed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pretrain.model.spec import ViTSpec
from pretrain.weights.formats import google
from pretrain.weights.formats.format import Format


def _fitted(spec: ViTSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class token's position goes into the class token, to which it is added anyway."""
    if spec.pool != "cls":
        return tensors
    token, positions = tensors["class_token"], tensors["position_embedding"].clone()
    slot = positions[:, :1].clone()
    positions[:, :1] = 0
    # Where there is nothing to add, the token stays as it is: −0.0 + 0.0 would be 0.0.
    return {
        **tensors,
        "class_token": torch.where(slot == 0, token, token + slot),
        "position_embedding": positions,
    }


BIG_VISION = Format(
    name="big_vision",
    library="timm",
    suffix=".npz",
    pixels_as_here=True,
    prepared=partial(google.prepared, google.BIG_VISION),
    spec=partial(google.spec, google.BIG_VISION),
    rows=partial(google.rows, google.BIG_VISION),
    lacks=google.lacks,
    example=google.example(google.BIG_VISION),
    # timm cannot read a file without positions.
    learned_positions=True,
    fitted=_fitted,
    arguments=partial(google.arguments, google.BIG_VISION),
)
