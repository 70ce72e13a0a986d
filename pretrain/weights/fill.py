"""Filling a network that is already built with weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from pretrain.errors import InputError
from pretrain.model.vit import VisionTransformer, load_tensors
from pretrain.weights.weights import Weights

Fill = Callable[[VisionTransformer, Weights], str]  # fills a new network with weights; returns what to print about it


def load_same(model: VisionTransformer, weights: Weights) -> str:
    """Fill a network with the weights of an identical one. Returns the empty string: there is nothing to report.

    Dropout and drop path may differ, and so may the image size where the number of patches does not.

    Raises:
        InputError: the weights belong to another network; names each size that differs. Some of them, such as the
            number of heads, change no shape, but what is computed.
    """
    size = model.spec.image_size if weights.spec.grid == model.spec.grid else weights.spec.image_size
    here = model.spec
    theirs = asdict(replace(weights.spec, dropout=here.dropout, drop_path=here.drop_path, image_size=size))
    ours = asdict(here)
    differing = [f"{key} is {theirs[key]!r}, the config's {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
    if differing:
        raise InputError(f"{weights.source}: of another network: {'; '.join(differing)}; give weights of this one")
    load_tensors(model, weights.tensors, where=str(weights.source))
    return ""
