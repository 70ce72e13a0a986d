"""Crops: what reaches the network of a decoded image."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from pretrain.errors import InputError
from pretrain.hashing import Draws
from pretrain.images.transforms import EvalImages, SquashImages, TrainImages, to_float


def smooth(height, width):
    """A picture without edges, uint8 [h, w, 3]."""
    y, x = np.mgrid[:height, :width].astype(float)
    planes = [120 + 100 * np.sin(x / 9 + y / 14), 255 * x / width, 255 * y / height]
    return np.stack(planes, -1).astype(np.uint8)


def chw(pixels):
    """uint8 [h, w, c] or [h, w] -> Tensor [c, h, w]"""
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def hwc(image):
    return image.permute(1, 2, 0).numpy()


# Training


def test_a_crop_depends_on_seed_epoch_and_id_alone():
    image = chw(smooth(60, 80))
    crops = {
        key: TrainImages(32, 3, key[0])(image, key[1], key[2]) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]
    }
    assert torch.equal(TrainImages(32, 3, 1)(image, 2, 3), crops[1, 2, 3])
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in crops.values())
    others = [crops[key] for key in crops if key != (1, 2, 3)]
    assert not any(torch.equal(crops[1, 2, 3], other) for other in others)


def test_a_training_image_is_the_resized_crop_and_half_of_them_are_mirrored():
    image = chw(smooth(60, 80))
    transform = TrainImages(24, 3, seed=5)
    mirrored = 0
    for sample_id in range(200):
        draws = Draws(5, 1, sample_id)
        flip = draws.uniform() < 0.5
        window = transform.crop(60, 80, draws)
        plain = F.resized_crop(image, *window, [24, 24], antialias=True)
        assert torch.equal(transform(image, 1, sample_id), plain.flip(-1) if flip else plain)
        mirrored += flip
    assert 75 < mirrored < 125


def test_without_flip_nothing_is_mirrored():
    image = chw(smooth(60, 80))
    transform = TrainImages(24, 3, seed=5, area=(1, 1), aspect=(4 / 3, 4 / 3), flip=False)
    assert len({transform(image, 0, sample_id).numpy().tobytes() for sample_id in range(20)}) == 1


def test_crops_cover_the_areas_and_aspects_asked_for():
    transform = TrainImages(224, 3, seed=0)
    windows = np.array([transform.crop(1000, 1000, Draws(0, 0, n)) for n in range(4000)])
    top, left, height, width = windows.T
    share, aspect = height * width / 1e6, width / height
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 1000).all()
    assert (left + width <= 1000).all()
    assert share.min() == pytest.approx(0.05, abs=0.005)
    assert share.max() > 0.97
    # Up to three quarters of a square, every aspect fits: uniform.
    counts = np.histogram(share, 5, (0.05, 0.75))[0]
    assert counts == pytest.approx(counts.mean(), rel=0.12)
    assert aspect.min() == pytest.approx(3 / 4, abs=0.01)
    assert aspect.max() == pytest.approx(4 / 3, abs=0.02)
    small = share < 0.5
    assert np.log(aspect[small]).mean() == pytest.approx(0, abs=0.02)
    assert np.histogram(np.log(aspect[small]), 4)[0] == pytest.approx(small.sum() / 4, rel=0.15)
    room = 1000 - height[small]
    assert (top[small] / room).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1))],
)
def test_where_no_crop_fits_the_middle_is_taken(height, width, window):
    transform = TrainImages(32, 3, seed=0, area=(1, 1))
    assert transform.crop(height, width, Draws(0, 0, 0)) == window


def test_the_torchvision_crops_of_a_run_stay_the_same():
    windows = [TrainImages(224, 3, 0).crop(375, 500, Draws(7, 2, n)) for n in range(4)]
    assert windows == [(114, 36, 260, 307), (12, 24, 363, 438), (66, 3, 302, 312), (0, 5, 375, 461)]


class Philox:
    """What TensorFlow's SimplePhilox is asked for, of other numbers."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def uniform(self):
        return self.generator.random(dtype=np.float32)

    def below(self, count):
        return int(self.generator.integers(count))


def bounding_box(height, width, random, areas=(0.05, 1.0), aspects=(0.75, 1.33)):
    """tf.image.sample_distorted_bounding_box(min_object_covered=0) in fp32: (top, left, height, width).

    Step by step as sample_distorted_bounding_box_op.cc, with its random numbers in its order.
    """
    one, lrintf = np.float32, lambda value: int(np.rint(one(value)))
    least_area, most_area = (one(share) * one(width) * one(height) for share in areas)
    for _ in range(100):
        ratio = one(random.uniform()) * (one(aspects[1]) - one(aspects[0])) + one(aspects[0])
        tall, most = lrintf(np.sqrt(least_area / ratio)), lrintf(np.sqrt(most_area / ratio))
        if lrintf(most * ratio) > width:
            most = int((width + 0.5 - 0.0000001) / float(ratio))
            if lrintf(most * ratio) > width:
                most -= 1
        most = min(most, height)
        tall = min(tall, most)
        if tall < most:
            tall += random.below(most - tall + 1)
        wide = lrintf(tall * ratio)
        if one(wide * tall) < least_area:
            tall += 1
            wide = lrintf(tall * ratio)
        if one(wide * tall) > most_area:
            tall -= 1
            wide = lrintf(tall * ratio)
        if least_area <= one(wide * tall) <= most_area and 0 < wide <= width and 0 < tall <= height:
            top = random.below(height - tall) if tall < height else 0
            return top, random.below(width - wide) if wide < width else 0, tall, wide
    return 0, 0, height, width


TENSORFLOW = TrainImages(224, 3, seed=0, aspect=(0.75, 1.33), law="tensorflow")
SIZES = [(375, 500), (500, 333), (640, 640), (28, 28)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_of_the_same_numbers_tensorflow_makes_the_same_crops(height, width):
    same = [
        TENSORFLOW.crop(height, width, Draws(3, 0, n)) == bounding_box(height, width, Draws(3, 0, n))
        for n in range(1000)
    ]
    # Rarely fp32 rounds to another pixel, or no number is drawn where there is one choice.
    assert sum(same) > (985 if height > 28 else 900)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crops_are_distributed_as_tensorflows(height, width):
    random = Philox(1)
    theirs, ours = (
        np.array([draw(n) for n in range(4000)], dtype=float).T
        for draw in (
            lambda n: bounding_box(height, width, random),
            lambda n: TENSORFLOW.crop(height, width, Draws(0, 0, n)),
        )
    )
    for found, expected in zip((*ours, ours[2] * ours[3]), (*theirs, theirs[2] * theirs[3]), strict=True):
        steps = np.linspace(0.02, 0.98, 25)
        assert np.quantile(found, steps) == pytest.approx(
            np.quantile(expected, steps), abs=max(1, 0.04 * expected.max())
        )


@pytest.mark.parametrize(("law", "mean"), [("torchvision", 0.463), ("tensorflow", 0.376)])
def test_tensorflows_crops_are_smaller(law, mean):
    transform = TrainImages(224, 3, seed=0, law=law)
    areas = [h * w / 1e6 for _, _, h, w in (transform.crop(1000, 1000, Draws(0, 0, n)) for n in range(8000))]
    assert np.mean(areas) == pytest.approx(mean, abs=0.01)
    assert min(areas) > 0.0499


def test_where_tensorflow_finds_no_crop_the_whole_image_is_taken():
    assert TENSORFLOW.crop(10, 1000, Draws(0, 0, 0)) == (0, 0, 10, 1000)
    assert TENSORFLOW.crop(1, 1, Draws(0, 0, 0)) == (0, 0, 1, 1)


@pytest.mark.parametrize("side", [1, 8, 28, 42])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiny_images_are_enlarged(side, channels):
    image = chw(smooth(side, side)[..., :channels])
    for transform in (
        TrainImages(32, channels, 0),
        TrainImages(32, channels, 0, law="tensorflow"),
        EvalImages(32, channels),
        EvalImages(32, channels, whole=True),
        SquashImages(32, channels),
    ):
        enlarged = transform(image, 0, 0)
        assert (enlarged.dtype, tuple(enlarged.shape)) == (torch.uint8, (channels, 32, 32))


# Evaluation


@pytest.mark.parametrize(("height", "width", "size"), [(375, 500, 224), (500, 375, 224), (100, 90, 32), (20, 30, 48)])
def test_evaluation_is_the_middle_of_the_image_at_eight_sevenths(height, width, size):
    pixels = smooth(height, width)
    resized = round(8 / 7 * size)
    scale = resized / min(height, width)
    new = (
        resized if width < height else int(width * scale),
        resized if height <= width else int(height * scale),
    )
    expected = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BILINEAR)).astype(int)
    top, left = (round((side - size) / 2) for side in expected.shape[:2])
    image = hwc(EvalImages(size, 3)(chw(pixels), 0, 0))
    assert image.shape == (size, size, 3)
    assert abs(image - expected[top : top + size, left : left + size]).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 50)])
def test_evaluation_of_the_whole_image_cuts_nothing_off(height, width):
    pixels = smooth(height, width)
    found = hwc(EvalImages(48, 3, whole=True)(chw(pixels), 0, 0))
    expected = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
    assert abs(found - expected).max() <= 1
    # Of a square image the centre alone is 7/8 a side: 28 of CIFAR's 32 px.
    assert abs(hwc(EvalImages(48, 3)(chw(pixels), 0, 0)) - expected).max() > 10


def test_a_long_strip_is_not_blown_up_whole():
    image = chw(np.zeros((1, 30_000, 3), np.uint8))
    begin = time.perf_counter()
    assert EvalImages(224, 3)(image, 0, 0).shape == (3, 224, 224)
    assert time.perf_counter() - begin < 1


# Few-shot


def tensorflow_resize(pixels, size):
    """tf.image.resize(pixels, [size, size], "bilinear", antialias=False) and the cast to uint8."""
    one = np.float32
    height, width, _ = pixels.shape

    def place(number, length):
        at = (one(number) + one(0.5)) * one(length / size) - one(0.5)
        return max(int(np.floor(at)), 0), min(int(np.ceil(at)), length - 1), at - np.floor(at)

    result = np.empty((size, size, 3), np.uint8)
    for row in range(size):
        above, below, down = place(row, height)
        for column in range(size):
            before, after, along = place(column, width)
            corners = [[pixels[y, x].astype(one) for x in (before, after)] for y in (above, below)]
            top, bottom = (left + (right - left) * along for left, right in corners)
            result[row, column] = (top + (bottom - top) * down).astype(np.uint8)
    return result


@pytest.mark.parametrize(
    ("height", "width", "size"), [(75, 100, 56), (28, 28, 56), (64, 64, 56), (200, 9, 49), (37, 37, 32)]
)
def test_the_squash_is_tensorflows_bit_for_bit(height, width, size):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = round(8 / 7 * size)
    edge = (resized - size) // 2
    expected = tensorflow_resize(pixels, resized)[edge : edge + size, edge : edge + size]
    assert np.array_equal(hwc(SquashImages(size, 3)(chw(pixels), 0, 0)), expected)


def test_the_squash_of_224_goes_through_256_and_ignores_the_aspect():
    wide = np.repeat(np.arange(0, 256, dtype=np.uint8)[None], 64, 0)  # 64 × 256, level = column
    image = SquashImages(224, 1)(chw(wide), 0, 0)
    assert np.array_equal(image[0], np.repeat(np.arange(16, 240, dtype=np.uint8)[None], 224, 0))


@pytest.mark.parametrize("level", [1, 77, 200, 255])
def test_the_squash_keeps_a_plain_image_at_its_level(level):
    image = SquashImages(224, 3)(chw(np.full((375, 499, 3), level, np.uint8)), 0, 0)
    assert (image == level).all()


# To the network


def test_levels_become_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    values = to_float(levels, torch.float32)
    assert values.shape == levels.shape
    assert torch.allclose(values.flatten(), torch.linspace(-1, 1, 256), atol=1e-6)
    assert to_float(levels, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(to_float(levels, torch.bfloat16), values.bfloat16())
    assert levels[0, 0, 0, 1] == 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TrainImages(224, 0, 0), "channels is 0"),
        (lambda: EvalImages(224, 4), "channels is 4"),
        (lambda: SquashImages(224, 2), "channels is 2"),
    ],
)
def test_images_are_grey_or_rgb(make, named):
    with pytest.raises(InputError, match=named):
        make()
