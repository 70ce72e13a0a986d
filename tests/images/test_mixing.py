"""Mixing: shares of the right distribution for every sample of every epoch, and pairs that no cut of a batch parts."""

import numpy as np
import pytest
import torch

from pretrain.errors import InputError
from pretrain.images.mixing import (
    Mixing,
    check_pairs,
    cut_boxes,
    keep_whole,
    mix_images,
    mix_weights,
    partners,
    uncut,
)

MANY = 100_000


def drawn(alpha, count=MANY, seed=0):
    return np.sort(mix_weights(alpha, seed, np.zeros(count, np.int64), np.arange(count)).double().numpy())


def distance(sample, distribution):
    """Kolmogorov and Smirnov's, of a sorted sample from a distribution function."""
    steps = np.arange(len(sample) + 1) / len(sample)
    values = distribution(sample)
    return max((steps[1:] - values).max(), (values - steps[:-1]).max())


@pytest.mark.parametrize(
    ("alpha", "distribution"),
    [
        (0.5, lambda w: 4 / np.pi * np.arcsin(np.sqrt(w)) - 1),  # of the arcsine law
        (1.0, lambda w: 2 * w - 1),
        (2.0, lambda w: 6 * w**2 - 4 * w**3 - 1),
    ],
)
def test_weights_follow_the_larger_half_of_beta_where_it_has_a_formula(alpha, distribution):
    # 1.95 / √n: one correct sampler in a thousand is further away.
    assert distance(drawn(alpha), distribution) < 1.95 / MANY**0.5


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 0.8, 8.0])
def test_weights_follow_the_larger_half_of_numpys_beta(alpha):
    weights = drawn(alpha)
    beta = np.random.default_rng(1).beta(alpha, alpha, MANY)
    reference = np.sort(np.maximum(beta, 1 - beta))
    grid = np.linspace(0.5, 1, 2000, endpoint=False)  # up to 0.99975: beyond, fp32 weights are 1 too often
    ours, numpys = (np.searchsorted(sample, grid) / MANY for sample in (weights, reference))
    assert abs(ours - numpys).max() < 1.95 * (2 / MANY) ** 0.5
    assert weights.mean() == pytest.approx(reference.mean(), abs=0.002)
    assert weights.var() == pytest.approx(reference.var(), rel=0.02)
    assert 0.5 <= weights.min() < weights.max() <= 1


def test_weights_are_finite_at_the_ends_of_alpha():
    assert drawn(1e-6, 1000).min() == 1
    assert drawn(1e6, 1000).max() < 0.503


def test_a_weight_belongs_to_seed_epoch_and_sample_and_never_changes():
    pinned = [0.59086716, 0.87765807, 0.80607587]
    assert mix_weights(0.2, 7, [0, 0, 3], [0, 1, 299_999_999]).tolist() == pytest.approx(pinned, abs=1e-6)
    epochs, ids = np.arange(40) % 4, np.arange(40) * 7
    whole = mix_weights(0.2, 3, epochs, ids)
    assert whole.dtype == torch.float32
    for row in range(40):
        assert mix_weights(0.2, 3, epochs[row : row + 1], ids[row : row + 1]) == whole[row]
    assert len({mix_weights(1.0, *key).item() for key in [(3, 1, 2), (4, 1, 2), (3, 2, 2), (3, 1, 3), (3, 2, 1)]}) == 5


def test_neighbours_and_epochs_draw_independently():
    table = mix_weights(1.0, 0, np.arange(100)[:, None].repeat(200, 1).ravel(), np.tile(np.arange(200), 100))
    table = table.view(100, 200).numpy()
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.03


@pytest.fixture
def images():
    return torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))


# Rows 2, 3, 6 and 7 are cut, and nothing is left of row 7.
BOXES = torch.tensor([[0] * 4] * 2 + [[0, 2, 1, 5], [4, 5, 0, 1]] + [[0] * 4] * 2 + [[1, 4, 1, 4], [0, 5, 0, 5]])
WEIGHT = torch.tensor([1.0, 0.5, 0.75, 0.9, 0.6, 1.0, 0.51, 0.99])


def test_a_row_is_mixed_with_its_neighbour(images):
    mixed = mix_images(images, WEIGHT)
    for row, weight in enumerate(WEIGHT.tolist()):
        expected = weight * images[row] + (1 - weight) * images[row ^ 1]
        assert torch.allclose(mixed[row], expected, atol=1e-6)
    assert torch.equal(mixed[0], images[0]), "a weight of 1 leaves a row as it is, to the last bit"
    assert torch.equal(partners(torch.arange(6)), torch.tensor([1, 0, 3, 2, 5, 4]))


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_any_even_cut_draws_and_gives_the_same_images(images, micro_batch, cutmix):
    mixing = Mixing(0.4, cutmix, 5, seed=3)
    epochs, ids = np.array([0] * 3 + [1] * 5), np.array([9, 8, 7, 0, 1, 2, 3, 4])

    def mixed(cut):
        rows = slice(cut, cut + micro_batch)
        weight, boxes = mixing.draw(epochs[rows], ids[rows])
        return weight, mix_images(images[rows], weight, boxes)

    parts = [mixed(cut) for cut in range(0, 8, micro_batch)]
    weight, boxes = mixing.draw(epochs, ids)
    assert torch.equal(torch.cat([part[0] for part in parts]), weight)
    assert torch.equal(torch.cat([part[1] for part in parts]), mix_images(images, weight, boxes))


@pytest.mark.parametrize("boxes", [None, BOXES])
def test_half_precision_images_are_mixed_in_full(images, boxes):
    half = images.bfloat16()
    mixed = mix_images(half, WEIGHT, boxes)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, mix_images(half.float(), WEIGHT, boxes).bfloat16())


def test_a_box_of_the_partner_is_pasted_and_rows_without_one_are_averaged(images):
    mixed, expected = mix_images(images, WEIGHT, BOXES), images.clone()
    for row, (top, bottom, left, right) in enumerate(BOXES.tolist()):
        if bottom == top:
            expected[row] = mix_images(images, WEIGHT)[row]
        for y in range(top, bottom):
            for x in range(left, right):
                expected[row, :, y, x] = images[row ^ 1, :, y, x]
    assert torch.equal(mixed, expected), "to the last bit"


def cutmix_loop(lam, row, column, size):
    """Yun et al., section 3.1, of uniform numbers: a box of 1 − λ of the image around (row, column), clipped."""
    side = round(size * (1 - lam) ** 0.5)
    edges = []
    for centre in (int(row * size), int(column * size)):
        first = centre - side // 2
        edges += [max(first, 0), min(first + side, size)]
    top, bottom, left, right = edges
    return edges, 1 - (bottom - top) * (right - left) / size**2


def test_a_box_belongs_to_seed_epoch_and_sample_and_its_true_area_is_the_share(monkeypatch):
    epochs, ids = np.arange(40) % 4, np.arange(40) * 7
    boxes = cut_boxes(1.0, 224, 3, epochs, ids)
    assert (boxes.dtype, boxes.shape) == (torch.int64, (40, 4))
    for row in range(40):
        assert torch.equal(cut_boxes(1.0, 224, 3, epochs[row : row + 1], ids[row : row + 1])[0], boxes[row])
    keys = [(3, 1, 2), (4, 1, 2), (3, 2, 2), (3, 1, 3), (3, 2, 1)]
    assert len({tuple(cut_boxes(1.0, 224, *key)[0].tolist()) for key in keys}) == 5

    numbers = np.random.default_rng(0).uniform(size=(4, 500))
    monkeypatch.setattr("pretrain.images.mixing._uniform", lambda *_: numbers)
    lams = 0.5 + mixing_beta(*numbers[:2])
    expected = [cutmix_loop(*found, 17) for found in zip(lams, *numbers[2:], strict=True)]
    drawn = cut_boxes(1.0, 17, 0, ids, ids)
    assert drawn.tolist() == [edges for edges, _ in expected]
    assert uncut(drawn, 17).numpy() == pytest.approx([share for _, share in expected], abs=1e-6)
    assert uncut(drawn, 17).min() < 0.2 < 0.98 < uncut(drawn, 17).max()


def mixing_beta(radius, angle):
    """Beta(1, 1) less a half, of the two numbers: s / (1 + s) for s = (1 / radius − 1) · cos²."""
    s = (1 / radius - 1) * np.cos(2 * np.pi * angle) ** 2
    return np.sign(np.cos(2 * np.pi * angle)) * 0.5 * np.sqrt(s / (1 + s))


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_boxes_follow_numpys_beta_on_both_sides_of_a_half_and_lie_anywhere(alpha):
    size = 100_000  # so that boxes of λ near 1 are not rounded away
    top, bottom, left, right = cut_boxes(alpha, size, 0, np.zeros(MANY, np.int64), np.arange(MANY)).double().unbind(1)
    inside = (top > 0) & (bottom < size)  # not clipped: there the side is that of λ
    lam = np.random.default_rng(1).beta(alpha, alpha, MANY)
    side, centre = np.sqrt(1 - lam), np.random.default_rng(2).uniform(size=MANY)
    reference = np.sort(side[abs(centre - 0.5) < (1 - side) / 2])
    ours = np.sort(((bottom - top) / size)[inside].numpy())
    grid = np.linspace(0, 1, 2000)
    gap = abs(np.searchsorted(ours, grid) / len(ours) - np.searchsorted(reference, grid) / len(reference)).max()
    assert gap < 1.95 * (1 / len(ours) + 1 / len(reference)) ** 0.5
    middle = (left + right)[(left > 0) & (right < size)] / 2 / size
    assert middle.mean() == pytest.approx(0.5, abs=0.01)


def test_with_both_a_coin_gives_a_whole_pair_to_one_of_them():
    epochs, ids = np.zeros(20_000, np.int64), np.random.default_rng(0).permutation(20_000)
    weight, boxes = Mixing(0.2, 1.0, 32, seed=5).draw(epochs, ids)
    only_boxes = cut_boxes(1.0, 32, 5, epochs, ids)
    mixed = (weight == mix_weights(0.2, 5, epochs, ids)) & ~boxes.any(dim=1)
    cut = (weight == uncut(only_boxes, 32)) & (boxes == only_boxes).all(dim=1)
    assert (mixed | cut).view(-1, 2).all()
    assert (mixed.view(-1, 2).all(dim=1) | cut.view(-1, 2).all(dim=1)).all(), "both rows alike"
    assert cut.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(Mixing(0.0, 1.0, 32, seed=5).draw(epochs, ids)[1], only_boxes)
    alone, none = Mixing(0.2, 0.0, 32, seed=5).draw(epochs, ids)
    assert torch.equal(alone, mix_weights(0.2, 5, epochs, ids))
    assert none is None


def test_a_pair_with_an_unreadable_image_is_not_mixed():
    valid = torch.tensor([True, True, True, False, False, True, False, False])
    weight, boxes = keep_whole(WEIGHT, BOXES, valid)
    assert torch.equal(weight, torch.tensor([1.0, 0.5, 1, 1, 1, 1, 1, 1]))
    assert torch.equal(boxes[:2], BOXES[:2])
    assert not boxes[2:].any()
    assert keep_whole(WEIGHT, None, valid)[1] is None


def test_a_micro_batch_that_cuts_a_pair_is_refused_by_name():
    check_pairs(6)
    with pytest.raises(
        InputError, match=r"data\.mixup and data\.cutmix .* a micro-batch of 7 .* even train\.micro_batch"
    ):
        check_pairs(7)
