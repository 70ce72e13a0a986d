"""Encoded bytes to uint8 images of the network's size: the crops of training, evaluation and few-shot."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torchvision.io
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as F

from pretrain.errors import InputError
from pretrain.stream.hashing import Draws

MAX_PIXELS = 100_000_000  # 300 MB once decoded, in each decode thread
GREY = 128  # stands in for an image that cannot be read
_CROP_TRIES = 10


class UnreadableImage(Exception):
    """The bytes of one image do not decode. The message says why."""


class Transform(Protocol):
    """Encoded image -> uint8 [channels, image_size, image_size], a function of its arguments alone.

    Called from several threads at once. Raises UnreadableImage.
    """

    @property
    def image_size(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def __call__(self, data: bytes, epoch: int, sample_id: int) -> Tensor: ...


@dataclass(frozen=True)
class TrainImages:
    """Inception crop and horizontal flip, drawn from (seed, epoch, sample id).

    area: share of the image the crop covers, uniform · aspect: width / height, log-uniform · channels: 1, 3.
    Raises InputError naming the field.
    """

    image_size: int
    channels: int
    seed: int
    area: tuple[float, float] = (0.05, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        _check_size(self.image_size, self.channels)
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise InputError(f"crop area is {self.area}; 0 < least <= most <= 1 would be right")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise InputError(f"crop aspect is {self.aspect}; 0 < least <= most would be right")

    def __call__(self, data: bytes, epoch: int, sample_id: int) -> Tensor:
        image = decode(data, self.channels)
        draws = Draws(self.seed, epoch, sample_id)
        flip = self.flip and draws.uniform() < 0.5
        top, left, height, width = self.crop(image.shape[1], image.shape[2], draws)
        size = [self.image_size, self.image_size]
        image = F.resized_crop(image, top, left, height, width, size, antialias=True)
        return image.flip(-1) if flip else image

    def crop(self, height: int, width: int, draws: Draws) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop: Szegedy et al. 2015, tries and fall-back as torchvision."""
        low, high = (math.log(bound) for bound in self.aspect)
        for _ in range(_CROP_TRIES):
            area = height * width * draws.uniform(*self.area)
            aspect = math.exp(draws.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return draws.below(height - h + 1), draws.below(width - w + 1), h, w
        # No crop fitted: the largest central one whose aspect is allowed.
        w = max(1, min(width, round(height * self.aspect[1])))
        h = max(1, min(height, round(width / self.aspect[0])))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class EvalImages:
    """Shorter side to 8/7 of the size, bilinear with antialias; its centre. InputError names a bad field."""

    image_size: int
    channels: int

    def __post_init__(self) -> None:
        _check_size(self.image_size, self.channels)

    def __call__(self, data: bytes, epoch: int, sample_id: int) -> Tensor:
        image = decode(data, self.channels)
        short = min(image.shape[1:])
        # Only a square around the middle is looked at; a strip of 1 × 100,000 must not be blown up whole.
        if max(image.shape[1:]) > 8 * short:
            image = F.center_crop(image, [min(side, 8 * short) for side in image.shape[1:]])
        image = F.resize(image, [_resize_to(self.image_size)], antialias=True)
        return F.center_crop(image, [self.image_size, self.image_size])


@dataclass(frozen=True)
class SquashImages:
    """The few-shot protocol's preprocessing, bit for bit TensorFlow's `tf.image.resize` on uint8.

    Both sides to 8/7 of the size whatever the aspect, bilinear, half-pixel centres, no antialias, cast back
    to uint8 by truncation; then the centre. Source: big_vision, `resize(256)|central_crop(224)`. InputError
    names a bad field.
    """

    image_size: int
    channels: int

    def __post_init__(self) -> None:
        _check_size(self.image_size, self.channels)

    def __call__(self, data: bytes, epoch: int, sample_id: int) -> Tensor:
        pixels = decode(data, self.channels).permute(1, 2, 0)
        above, below, down = self._taps(pixels.shape[0])
        before, after, along = self._taps(pixels.shape[1])

        # Left to right, then top to bottom, as a + (b - a)·t in fp32: another grouping of the same sum can
        # fall just short of a whole number, and truncation makes that the next lower grey level.
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
        place = centres * np.float32(length / resized) - np.float32(0.5)
        floor = np.floor(place)
        low = np.maximum(floor, 0).astype(np.int64)
        high = np.minimum(np.ceil(place), length - 1).astype(np.int64)
        low = np.minimum(low, high)
        return torch.from_numpy(low), torch.from_numpy(high), torch.from_numpy(place - floor)


def to_float(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 0…255 -> `dtype` in [-1, 1], on the device the images are on; same shape."""
    return images.float().div_(127.5).sub_(1).to(dtype)


def decode(data: bytes, channels: int) -> Tensor:
    """JPEG, PNG or WebP, told apart by their first bytes -> uint8 [channels, h, w], grey (1) or RGB (3).

    Alpha is dropped, orientation tags are not applied. Raises UnreadableImage; for an image above MAX_PIXELS,
    before any of it is decoded.
    """
    kind, height, width = read_header(data)
    if height * width > MAX_PIXELS:
        raise UnreadableImage(f"{kind} of {width} x {height} pixels, above the limit of {MAX_PIXELS:,}")
    if height * width == 0:
        raise UnreadableImage(f"{kind} of {width} x {height} pixels")
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    if kind == "png":
        return _decode_png(data, channels)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        if kind == "jpeg":
            return torchvision.io.decode_jpeg(encoded, mode)
        image = torchvision.io.decode_webp(encoded, ImageReadMode.RGB)
    except RuntimeError as error:
        raise UnreadableImage(f"{kind}: {_last_clause(error)}") from error
    return F.rgb_to_grayscale(image) if channels == 1 else image


def _decode_png(data: bytes, channels: int) -> Tensor:
    # Pillow, not torchvision.io: its decode_png kills the process on an error in libpng (a bad checksum).
    try:
        image = PngImageFile(io.BytesIO(data))
        image.info.pop("transparency", None)  # of a palette; dropped like all alpha, without Pillow's warning
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips instead of scaling
            pixels = (np.asarray(image) >> 8).astype(np.uint8)[:, :, None].repeat(channels, axis=2)
        else:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
            pixels = pixels.reshape(image.height, image.width, channels)
    except Exception as error:  # of a dozen kinds, none of them documented
        raise UnreadableImage(f"png: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_header(data: bytes) -> tuple[str, int, int]:
    """(`jpeg`, `png` or `webp`, height, width) as the first bytes declare. Raises UnreadableImage."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", data, 16)
            return "png", height, width
        if data[:2] == b"\xff\xd8":
            return "jpeg", *_jpeg_size(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return "webp", *_webp_size(data)
    except (struct.error, IndexError) as error:
        raise UnreadableImage(f"cut off in the header, {len(data)} bytes") from error
    raise UnreadableImage(f"not JPEG, PNG or WebP: {len(data)} bytes that begin {data[:8].hex(' ')!r}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    place = 2
    while True:
        if data[place] != 0xFF:
            raise UnreadableImage(f"jpeg: no marker at byte {place}")
        while data[place] == 0xFF:  # any number of fill bytes
            place += 1
        marker = data[place]
        place += 1
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            height, width = struct.unpack_from(">HH", data, place + 3)
            return height, width
        if marker in (0xD9, 0xDA):
            raise UnreadableImage("jpeg: no frame header before the image data")
        if marker != 0x01 and not 0xD0 <= marker <= 0xD8:  # markers without a body
            place += struct.unpack_from(">H", data, place)[0]


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        struct.unpack_from("6x", data, 24)  # a slice never complains that it is short
        return height, width
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    raise UnreadableImage(f"webp: unknown chunk {kind!r}")


def _resize_to(size: int) -> int:
    """round(8/7·size), in integers: 256 for 224."""
    return (16 * size + 7) // 14


def _last_clause(error: Exception) -> str:
    """torch's message without the path of the C++ file that raised it."""
    return str(error).splitlines()[0].rpartition("cpp:")[2].partition(", ")[2] or str(error)


def _check_size(image_size: int, channels: int) -> None:
    if image_size < 1:
        raise InputError(f"image_size is {image_size}; at least 1 would be right")
    if channels not in (1, 3):
        raise InputError(f"channels is {channels}; images are read as grey (1) or RGB (3)")
