"""How the images of weights from elsewhere were normalised, and how this is folded into the patch embedding.

Here pixels are x / 127.5 − 1: mean and standard deviation 0.5 of values in [0, 1]. A network that was trained with
others, as torchvision's and many of timm's were with ImageNet's, is the same function of an image once its patch
embedding has taken the difference up, which is linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import InputError
from pretrain.weights.tensorfile import TensorFile

WEIGHT, BIAS = "patch_embedding.weight", "patch_embedding.bias"


@dataclass(frozen=True)
class Normalisation:
    """(x − mean) / std of values in [0, 1], for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def ours(self) -> bool:
        return all(value == 0.5 for value in (*self.mean, *self.std))

    def __str__(self) -> str:
        return f"mean {_words(self.mean)}, std {_words(self.std)}"


OURS = Normalisation((0.5,), (0.5,))


def told_by(file: TensorFile) -> Normalisation | None:
    """What Hugging Face's preprocessor_config.json or timm's config.json beside a file says; None without either.

    Raises:
        InputError: it is none of numbers, or says that pixels are scaled otherwise than by 1/255, or not normalised.
    """
    beside = file.notes.get("preprocessor", {})
    for key, right in (("do_rescale", True), ("rescale_factor", 1 / 255), ("do_normalize", True)):
        if (said := beside.get(key)) is not None and not _same(said, right):
            raise InputError(
                f"weights {file.where}: preprocessor_config.json: {key} is {said!r}, and only {right!r} is read; "
                "correct it, or remove that file and tell export.py --mean and --std of values in [0, 1]"
            )
    found: Any = beside.get("image_mean"), beside.get("image_std")
    if found == (None, None):
        trained: Any = file.notes.get("config", {}).get("pretrained_cfg")
        found = (trained.get("mean"), trained.get("std")) if isinstance(trained, dict) else (None, None)
    if found == (None, None):
        return None
    return checked(*found, where=file.where)


def checked(mean: Any, std: Any, *, where: str) -> Normalisation:
    """A normalisation of numbers. Raises InputError where they are none, or do not go together."""
    try:
        found = Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
    except (TypeError, ValueError):
        found = Normalisation((), ())
    finite = all(map(math.isfinite, (*found.mean, *found.std)))
    if not found.mean or len(found.mean) != len(found.std) or min(found.std) <= 0 or not finite:
        raise InputError(
            f"weights {where}: mean {mean!r} and std {std!r} of its images are no normalisation; a number for each "
            "channel would be, std above 0"
        )
    return found


def fold(tensors: Mapping[str, Tensor], found: Normalisation, *, where: str) -> dict[str, Tensor]:
    """The tensors of the network that makes of x / 127.5 − 1 what `tensors` make of images normalised as `found` says.

    With y = 2x − 1, (x − mean) / std = y / (2·std) + (0.5 − mean) / std. Computed in fp64.

    Raises:
        InputError: the network has another number of channels.
    """
    kernel = tensors[WEIGHT].double()
    if kernel.shape[1] != len(found.mean):
        raise InputError(
            f"weights {where}: {found} is for {len(found.mean)} channels, the network has {kernel.shape[1]}"
        )
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (found.mean, found.std))
    shift = torch.einsum("dcpq,c->d", kernel, (0.5 - mean) / std)
    return {
        **tensors,
        WEIGHT: (kernel / (2 * std)[:, None, None]).float(),
        BIAS: (tensors[BIAS].double() + shift).float(),
    }


def _same(said: Any, right: float) -> bool:
    return isinstance(said, bool | float | int) and math.isclose(said, right, rel_tol=1e-6)


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
