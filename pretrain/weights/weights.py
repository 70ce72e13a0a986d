"""Weights that were read: a network's sizes and tensors, and where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pretrain.model.positions import resize_to
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer, load_tensors

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Weights:
    """A network's parameters, whole, in fp32 on the CPU."""

    spec: ViTSpec
    tensors: dict[str, Tensor]
    step: int | None  # of training; None where a file does not record it
    source: Path | str  # the checkpoint, file, folder or URL that they were read from
    sha256: str  # of names, shapes and values: the same however many ranks wrote them
    averaged: bool = False  # whether they are the Polyak average
    trained_on: str = ""  # the index's hash; empty where it is not recorded
    whole: bool = False  # whether their run evaluated whole images, squashed, rather than their centres

    def model(self, image_size: int | None = None) -> VisionTransformer:
        """The network with these weights, on the CPU in eval mode.

        Args:
            image_size: side of its images in pixels, to which learned positions are resized; None: as trained.

        Raises:
            InputError: the image is smaller than a patch.
        """
        model = VisionTransformer(replace(self.spec, image_size=image_size or self.spec.image_size))
        load_tensors(model, resize_to(model.spec, self.tensors), where=f"weights {self.source}")
        return model.eval()

    def preprocess(self, image: Image) -> Tensor:
        """A PIL image as the network takes it: float32 [channels, image_size, image_size] in [-1, 1].

        Resized and cropped as their run evaluated: the shorter side to 8/7 of the image size, then the centre;
        or, with `data.eval_crop` "whole", all of it squashed to the size. Alpha is dropped and an EXIF orientation is
        not applied, as in training.
        """
        import torch

        from pretrain.images.decode import from_pillow
        from pretrain.images.transforms import EvalImages, to_float

        pixels = from_pillow(image, self.spec.channels)
        images = EvalImages(self.spec.image_size, self.spec.channels, self.whole)
        return to_float(images(pixels, 0, 0), torch.float32)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over every tensor's name, shape and fp32 little-endian values, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].float().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
