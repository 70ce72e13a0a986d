"""RandAugment: every operation against Pillow's, and the draws of a sample of an epoch."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as F

from pretrain.hashing import Draws
from pretrain.images.randaugment import OPERATIONS, RandAugment
from pretrain.images.transforms import TrainImages

GREY = (128, 128, 128)


class Given:
    """Draws that are known: `below` says the numbers given."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def below(self, count):
        return next(self.numbers)


def picture(height=90, width=120, channels=3):
    """Ramps, waves and noise between levels 20 and 220, uint8 [c, h, w]."""
    y, x = np.mgrid[:height, :width].astype(float)
    noise = np.random.default_rng(0).uniform(0, 40, (3, height, width))
    planes = np.stack([90 + 70 * np.sin(x / 9 + y / 14), 20 + 160 * x / width, 20 + 160 * y / height]) + noise
    return torch.from_numpy(planes[:channels].astype(np.uint8))


def pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def moved(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)


# By the signed magnitude / 10.
PILLOW = {
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Invert": lambda image, m: ImageOps.invert(image),
    "Rotate": lambda image, m: image.rotate(30 * m, fillcolor=GREY),
    "Posterize": lambda image, m: ImageOps.posterize(image, int(4 * m)),
    "Solarize": lambda image, m: ImageOps.solarize(image, int(256 * m) % 256),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(0.1 + 1.8 * m),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * m),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * m),
    "ShearX": lambda image, m: moved(image, 1, 0.3 * m, 0, 0, 1, 0),
    "ShearY": lambda image, m: moved(image, 1, 0, 0, 0.3 * m, 1, 0),
    "TranslateX": lambda image, m: moved(image, 1, 0, 100 * m, 0, 1, 0),
    "TranslateY": lambda image, m: moved(image, 1, 0, 0, 0, 1, 100 * m),
    "SolarizeAdd": lambda image, m: image.point(lambda v: min(v + int(110 * m), 255) if v < 128 else v),
}
# Pillow rounds the grey that a factor moves away from; torchvision takes what is below, or the exact mean.
NEARLY = {"AutoContrast": 1, "Color": 1, "Contrast": 1}
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def test_the_operations_are_the_references_sixteen_in_its_order():
    assert list(OPERATIONS) == [
        *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast"),
        *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"),
    ]


@pytest.mark.parametrize("magnitude", [3, 7, 10])
@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows(name, magnitude):
    image = picture()
    before = image.clone()
    for sign in (1, 0):
        found = OPERATIONS[name](image, magnitude / 10, Given(sign))
        assert (found.dtype, found.shape) == (image.dtype, image.shape)
        level = magnitude / 10 if sign or name not in MOVING else -magnitude / 10
        apart = (found.int() - levels(PILLOW[name](pillow(image), level)).int()).abs()
        if name in MOVING:
            # On the line between two pixels, Pillow's fixed-point arithmetic may fall into the other one.
            assert (apart > 0).any(dim=0).float().mean() < 0.001
        else:
            assert apart.max() <= NEARLY.get(name, 0)
    assert torch.equal(image, before)


def test_at_magnitude_ten_solarize_inverts_all_as_the_reference_does():
    image = picture()
    assert torch.equal(OPERATIONS["Solarize"](image, 1.0, Given()), 255 - image)
    assert torch.equal(OPERATIONS["Solarize"](image, 0.5, Given()), torch.where(image < 128, image, 255 - image))


@pytest.mark.parametrize("shape", [(3, 60, 80), (1, 60, 80), (3, 2, 9), (1, 1, 1)])
@pytest.mark.parametrize("magnitude", [0, 5, 10])
def test_sharpness_is_torchvisions_to_the_bit(shape, magnitude):
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = F.adjust_sharpness(image, 0.1 + 0.18 * magnitude)
    assert torch.equal(OPERATIONS["Sharpness"](image, magnitude / 10, Given()), expected)


@pytest.mark.parametrize(("y", "x"), [(0, 0), (45, 60), (89, 119), (10, 100)])
def test_cutout_is_a_grey_square_around_a_point_cut_at_the_edges(y, x):
    image = picture()
    before, expected = image.clone(), image.clone()
    expected[:, max(0, y - 20) : y + 20, max(0, x - 20) : x + 20] = 128
    assert torch.equal(OPERATIONS["Cutout"](image, 0.5, Given(y, x)), expected)
    assert torch.equal(image, before)


@pytest.mark.parametrize("name", MOVING)
def test_what_a_movement_uncovers_is_grey(name):
    white = torch.full((3, 224, 224), 255, dtype=torch.uint8)
    found = OPERATIONS[name](white, 1.0, Given(1))
    assert set(found.unique().tolist()) == {128, 255}
    share = (found == 128).float().mean().item()
    expected = {"Rotate": 0.155, "ShearX": 0.15, "ShearY": 0.15, "TranslateX": 100 / 224, "TranslateY": 100 / 224}
    assert share == pytest.approx(expected[name], abs=0.01)


@pytest.mark.parametrize("name", OPERATIONS)
def test_grey_images_are_treated_as_colour_ones_of_equal_channels(name):
    grey = picture(channels=1)
    for magnitude in (0, 5, 10, 15, 30):
        one, three = (
            OPERATIONS[name](image, magnitude / 10, Draws(0, 0, 1)) for image in (grey, grey.expand(3, -1, -1))
        )
        assert one.shape == grey.shape
        # torchvision's grey of equal channels may be one level less, and a factor moves away from it.
        allowed = 1 + abs(0.18 * magnitude - 0.9) if name in ("Color", "Contrast") else 0
        assert (three.int() - one.int()).abs().max() <= allowed


# Draws


def test_an_augmentation_is_the_operations_drawn_one_after_the_other():
    image, names = picture(), list(OPERATIONS)
    for sample_id in range(50):
        draws, expected = Draws(3, 1, sample_id), image
        for _ in range(3):
            expected = OPERATIONS[names[draws.below(16)]](expected, 0.9, draws)
        assert torch.equal(RandAugment(3, 9)(image, Draws(3, 1, sample_id)), expected)


def test_operations_and_signs_are_drawn_evenly(monkeypatch):
    image = torch.zeros(1, 4, 4, dtype=torch.uint8)
    counts = dict.fromkeys(OPERATIONS, 0)
    signs = []

    def counting(name):
        def operation(image, level, draws):
            counts[name] += 1
            signs.append(draws.below(2))
            return image

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, counting(name))
    for sample_id in range(8000):
        RandAugment(2, 10)(image, Draws(0, 0, sample_id))
    assert list(counts.values()) == pytest.approx([1000] * 16, rel=0.12)
    assert np.mean(signs) == pytest.approx(0.5, abs=0.02)


def test_a_training_image_is_cropped_then_mirrored_then_augmented():
    image = picture()
    plain, augmented = TrainImages(48, 3, 5), TrainImages(48, 3, 5, randaugment=RandAugment(2, 10))
    changed = 0
    for sample_id in range(40):
        draws = Draws(5, 2, sample_id)
        draws.uniform()
        plain.crop(90, 120, draws)
        crop = plain(image, 2, sample_id)
        assert torch.equal(augmented(image, 2, sample_id), RandAugment(2, 10)(crop, draws))
        changed += not torch.equal(augmented(image, 2, sample_id), crop)
    assert changed > 30


def test_the_same_in_any_thread_and_another_in_another_epoch():
    image, transform = picture(), TrainImages(48, 3, 5, randaugment=RandAugment(2, 3))
    alone = [transform(image, 1, sample_id) for sample_id in range(80)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda sample_id: transform(image, 1, sample_id), range(80)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert not any(torch.equal(alone[sample_id], transform(image, 2, sample_id)) for sample_id in range(50))
