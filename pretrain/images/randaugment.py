"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719): a few operations on an image, drawn from a list of sixteen.

The list and what a magnitude m means to each are those of big_vision's `randaug(layers, m)`, which the published
ViT recipes use; each operation changes pixels as Pillow's of that name does. l = m / 10:

    AutoContrast, Equalize, Invert    no argument
    Posterize                         int(4·l) upper bits stay
    Solarize                          levels from int(256·l) mod 256 on are inverted
    SolarizeAdd                       int(110·l) more for levels below 128
    Color, Contrast, Brightness, Sharpness      factor 0.1 + 1.8·l
    Rotate                            ±30°·l about the centre
    ShearX, ShearY                    ±0.3·l about the upper left corner
    TranslateX, TranslateY            ±100·l pixels
    Cutout                            int(40·l) pixels to each side of a point anywhere in the image

Movements take the nearest pixel; what they uncover, and what Cutout covers, is grey. Distances are in pixels whatever
the size of the image; the numbers are for 224.

Two operations of the reference are odd. It compares uint8 with Solarize's threshold, so that 256, at m = 10, wraps to 0
and all is inverted (google-research/big_vision#110): kept. Its Contrast moves away from the number of pixels / 256
instead of the mean level (google-research/big_vision#109): not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as F

from pretrain.hashing import Draws
from pretrain.images.decode import GREY


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations one after the other, each drawn anew, all at `magnitude` (0 to 30)."""

    layers: int
    magnitude: int

    def __call__(self, image: Tensor, draws: Draws) -> Tensor:
        """uint8 [c, h, w], c 1 or 3 -> the same shape; the image given is not changed."""
        for _ in range(self.layers):
            operation = OPERATIONS[_NAMES[draws.below(len(_NAMES))]]
            image = operation(image, self.magnitude / 10, draws)
        return image


def _posterize(image: Tensor, level: float, draws: Draws) -> Tensor:
    return F.posterize(image, min(int(4 * level), 8))


def _solarize(image: Tensor, level: float, draws: Draws) -> Tensor:
    return F.solarize(image, int(256 * level) % 256)


def _solarize_add(image: Tensor, level: float, draws: Draws) -> Tensor:
    more = min(int(110 * level), 255)
    return torch.where(image < 128, image.clamp(max=255 - more) + more, image)


def _sharpness(image: Tensor, level: float, draws: Draws) -> Tensor:
    # Equal to torchvision's bit for bit, whose convolution takes sixteen times as long on one thread.
    pixels = image.float()
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    blurred = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = pixels[:, 1:-1, 1:-1]
    blurred.add_(inner, alpha=4).div_(13).round_()
    inner.sub_(blurred).mul_(_factor(level)).add_(blurred)
    return pixels.clamp_(0, 255).to(torch.uint8)


def _rotate(image: Tensor, level: float, draws: Draws) -> Tensor:
    angle = math.radians(_signed(30 * level, draws))
    cos, sin = math.cos(angle), math.sin(angle)
    y, x = (side / 2 for side in image.shape[1:])
    return _moved(image, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


def _shear_x(image: Tensor, level: float, draws: Draws) -> Tensor:
    return _moved(image, (1, _signed(0.3 * level, draws), 0), (0, 1, 0))


def _shear_y(image: Tensor, level: float, draws: Draws) -> Tensor:
    return _moved(image, (1, 0, 0), (_signed(0.3 * level, draws), 1, 0))


def _translate_x(image: Tensor, level: float, draws: Draws) -> Tensor:
    return _moved(image, (1, 0, _signed(100 * level, draws)), (0, 1, 0))


def _translate_y(image: Tensor, level: float, draws: Draws) -> Tensor:
    return _moved(image, (1, 0, 0), (0, 1, _signed(100 * level, draws)))


def _cutout(image: Tensor, level: float, draws: Draws) -> Tensor:
    reach = int(40 * level)
    y, x = (draws.below(side) for side in image.shape[1:])
    image = image.clone()
    image[:, max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = GREY
    return image


# In the order of the reference. Operation(image uint8 [c, h, w], magnitude / 10, draws) -> uint8 [c, h, w]
OPERATIONS: dict[str, Callable[[Tensor, float, Draws], Tensor]] = {
    "AutoContrast": lambda image, level, draws: F.autocontrast(image),
    "Equalize": lambda image, level, draws: F.equalize(image),
    "Invert": lambda image, level, draws: F.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": lambda image, level, draws: F.adjust_saturation(image, _factor(level)),
    "Contrast": lambda image, level, draws: F.adjust_contrast(image, _factor(level)),
    "Brightness": lambda image, level, draws: F.adjust_brightness(image, _factor(level)),
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
_NAMES = tuple(OPERATIONS)


def _factor(level: float) -> float:
    return 0.1 + 1.8 * level


def _signed(value: float, draws: Draws) -> float:
    return value if draws.below(2) else -value


def _moved(image: Tensor, to_x: tuple[float, float, float], to_y: tuple[float, float, float]) -> Tensor:
    """The image whose pixel at (x, y) is the one at (a·x + b·y + c of `to_x`, a·x + b·y + c of `to_y`).

    Coordinates start at the upper left corner, so that the first pixel's centre is at (0.5, 0.5), as in Pillow.
    """
    # Four times as fast as torchvision's affine, which samples four channels of fp32.
    channels, height, width = image.shape
    y, x = (torch.arange(side, dtype=torch.float64, device=image.device).add_(0.5) for side in (height, width))
    # In the image with a grey border one pixel wide, to which everything outside is clamped.
    column, row = (
        (x * a + (y * b + c + 1)[:, None]).clamp_(0, side + 1).floor_()
        for (a, b, c), side in ((to_x, width), (to_y, height))
    )
    places = row.mul_(width + 2).add_(column).long().view(1, -1)
    bordered = pad(image, (1, 1, 1, 1), value=GREY).reshape(channels, -1)
    return bordered.gather(1, places.expand(channels, -1)).view_as(image)
