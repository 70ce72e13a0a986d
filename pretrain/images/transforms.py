"""Decoded images to the network's size, uint8 to uint8, for training, evaluation and few-shot; and bytes to floats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from pretrain.errors import InputError
from pretrain.hashing import Draws
from pretrain.images.randaugment import RandAugment

Law = Literal["torchvision", "tensorflow"]


class Transform(Protocol):
    """Decoded image, uint8 [channels, h, w] -> uint8 [channels, image_size, image_size].

    A function of its arguments alone, called from several threads at once; it does not change the image it gets.
    """

    @property
    def image_size(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def __call__(self, image: Tensor, epoch: int, sample_id: int) -> Tensor: ...


@dataclass(frozen=True)
class TrainImages:
    """Inception crop (Szegedy et al. 2015), horizontal flip, and RandAugment; drawn from (seed, epoch, sample id).

    channels: 1 or 3.
    area: smallest and largest share of the image that the crop covers.
    aspect: smallest and largest width / height of the crop.
    law: how both are drawn, as torchvision or as TensorFlow does.
    """

    image_size: int
    channels: int
    seed: int
    area: tuple[float, float] = (0.05, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    randaugment: RandAugment | None = None
    law: Law = "torchvision"

    def __post_init__(self) -> None:
        _check_channels(self.channels)

    def __call__(self, image: Tensor, epoch: int, sample_id: int) -> Tensor:
        draws = Draws(self.seed, epoch, sample_id)
        flip = self.flip and draws.uniform() < 0.5
        top, left, height, width = self.crop(image.shape[1], image.shape[2], draws)
        image = _resized_crop(image, top, left, height, width, self.image_size)
        if flip:
            image = image.flip(-1)
        return self.randaugment(image, draws) if self.randaugment else image

    def crop(self, height: int, width: int, draws: Draws) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop, drawn as `law` says."""
        draw = _torchvision_crop if self.law == "torchvision" else _tensorflow_crop
        return draw(height, width, self.area, self.aspect, draws)


@dataclass(frozen=True)
class EvalImages:
    """The shorter side resized to 8/7 of the size, bilinear with antialias, then the centre.

    whole: the whole image is resized to the size instead, whatever its aspect; nothing is cut off.
    """

    image_size: int
    channels: int
    whole: bool = False

    def __post_init__(self) -> None:
        _check_channels(self.channels)

    def __call__(self, image: Tensor, epoch: int, sample_id: int) -> Tensor:
        if self.whole:
            return F.resize(image, [self.image_size, self.image_size], antialias=True)
        short = min(image.shape[1:])
        # Only a square around the middle is used; a strip of 1 × 100,000 must not be enlarged whole.
        if max(image.shape[1:]) > 8 * short:
            image = F.center_crop(image, [min(side, 8 * short) for side in image.shape[1:]])
        image = F.resize(image, [_resize_to(self.image_size)], antialias=True)
        return F.center_crop(image, [self.image_size, self.image_size])


@dataclass(frozen=True)
class SquashImages:
    """The few-shot protocol's preprocessing, bit for bit TensorFlow's `tf.image.resize` on uint8.

    Both sides are resized to 8/7 of the size whatever the aspect, bilinear, half-pixel centres, no antialias, cast
    back to uint8 by truncation; then the centre. Source: big_vision, `resize(256)|central_crop(224)`.
    """

    image_size: int
    channels: int

    def __post_init__(self) -> None:
        _check_channels(self.channels)

    def __call__(self, image: Tensor, epoch: int, sample_id: int) -> Tensor:
        pixels = image.permute(1, 2, 0)
        above, below, down = self._taps(pixels.shape[0])
        before, after, along = self._taps(pixels.shape[1])

        # Left to right, then top to bottom, as a + (b - a)·t in fp32: another grouping of the same sum can fall just
        # short of a whole number, which truncation makes the next lower grey level.
        def blend(numbers: Tensor) -> Tensor:
            rows = pixels.index_select(0, numbers)
            left, right = rows.index_select(1, before).float(), rows.index_select(1, after).float()
            return left.add_(right.sub_(left).mul_(along[:, None]))

        top, bottom = blend(above), blend(below)
        squashed = top.add_(bottom.sub_(top).mul_(down[:, None, None]))
        return squashed.to(torch.uint8).permute(2, 0, 1)

    def _taps(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each pixel kept of an axis: the two it lies between, int64 [s], and how far along, fp32 [s]."""
        resized = _resize_to(self.image_size)
        first = (resized - self.image_size) // 2
        centres = np.arange(first, first + self.image_size, dtype=np.float32) + np.float32(0.5)
        position = centres * np.float32(length / resized) - np.float32(0.5)
        floor = np.floor(position)
        low = np.maximum(floor, 0).astype(np.int64)
        high = np.minimum(np.ceil(position), length - 1).astype(np.int64)
        low = np.minimum(low, high)
        return torch.from_numpy(low), torch.from_numpy(high), torch.from_numpy(position - floor)


def to_float(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 0…255 -> `dtype` in [-1, 1], same shape, on the images' device. Floats are in [-1, 1] already."""
    if images.is_floating_point():
        return images.to(dtype)
    return to_unit_(images.float()).to(dtype)


def to_unit_(pixels: Tensor) -> Tensor:
    """Floats 0…255 to [-1, 1], in place: what `to_float` computes, bit for bit."""
    return pixels.div_(127.5).sub_(1)


def _torchvision_crop(
    height: int, width: int, areas: tuple[float, float], aspects: tuple[float, float], draws: Draws
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as torchvision's RandomResizedCrop: area uniform, aspect log-uniform, 10 tries."""
    low, high = math.log(aspects[0]), math.log(aspects[1])
    for _ in range(10):
        area = height * width * draws.uniform(*areas)
        aspect = math.exp(draws.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draws.below(height - h + 1), draws.below(width - w + 1), h, w
    # No crop fitted: the largest central one whose aspect is allowed.
    w = max(1, min(width, round(height * aspects[1])))
    h = max(1, min(height, round(width / aspects[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def _tensorflow_crop(
    height: int, width: int, areas: tuple[float, float], aspects: tuple[float, float], draws: Draws
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as TensorFlow's sample_distorted_bounding_box with the whole image as its object.

    Aspect uniform, then the height uniform among those that area and image allow, so that small crops are more likely:
    the mean area of 5 to 100 % is 38 % of a square image, torchvision's 46 %. Where 100 tries fail, the whole image.
    """
    least_area, most_area = (share * height * width for share in areas)
    for _ in range(100):
        aspect = draws.uniform(*aspects)
        most = min(round(math.sqrt(most_area / aspect)), int((width + 0.5 - 1e-7) / aspect), height)
        least = min(round(math.sqrt(least_area / aspect)), most)
        h = least + draws.below(most - least + 1)
        w = round(h * aspect)
        if w * h < least_area:  # by rounding, as below
            h += 1
            w = round(h * aspect)
        if w * h > most_area:
            h -= 1
            w = round(h * aspect)
        if 0 < w <= width and 0 < h <= height and least_area <= w * h <= most_area:
            # TensorFlow never draws the last position: its random numbers end one short, where there is more than one.
            return draws.below(max(1, height - h)), draws.below(max(1, width - w)), h, w
    return 0, 0, height, width


def _resized_crop(image: Tensor, top: int, left: int, height: int, width: int, size: int) -> Tensor:
    """uint8 [c, h, w] -> [c, size, size], bilinear with antialias: torchvision's `resized_crop`, in its layout."""
    if image.device.type != "cpu":  # such kernels do not take uint8; torchvision converts to floats and back
        return F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    # torchvision calls the same kernel, after twice the time under the interpreter's lock. One image counts as
    # channels-last only if its first stride says so; otherwise the kernel takes it apart into planes, pixel by pixel.
    offset = image.storage_offset() + top * image.stride(1) + left * image.stride(2)
    crop = image.as_strided((1, image.shape[0], height, width), (image.numel(), *image.stride()), offset)
    return interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def _resize_to(size: int) -> int:
    """round(8/7·size), in integers: 256 for 224."""
    return (16 * size + 7) // 14


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise InputError(f"channels is {channels}; images are read as grey (1) or RGB (3)")
