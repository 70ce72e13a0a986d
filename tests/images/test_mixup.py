"""Mixup: weights of the right distribution for every sample of every epoch, and pairs that no cut of a batch parts."""

import numpy as np
import pytest
import torch

from pretrain.errors import InputError
from pretrain.images.mixup import check_pairs, keep_whole, mix_images, mix_weights, partners

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


WEIGHT = torch.tensor([1.0, 0.5, 0.75, 0.9, 0.6, 1.0, 0.51, 0.99])


def test_a_row_is_mixed_with_its_neighbour(images):
    mixed = mix_images(images, WEIGHT)
    for row, weight in enumerate(WEIGHT.tolist()):
        expected = weight * images[row] + (1 - weight) * images[row ^ 1]
        assert torch.allclose(mixed[row], expected, atol=1e-6)
    assert torch.equal(mixed[0], images[0]), "a weight of 1 leaves a row as it is, to the last bit"
    assert torch.equal(partners(torch.arange(6)), torch.tensor([1, 0, 3, 2, 5, 4]))


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_any_even_cut_gives_the_same_images(images, micro_batch):
    parts = [
        mix_images(part, weight)
        for part, weight in zip(images.split(micro_batch), WEIGHT.split(micro_batch), strict=True)
    ]
    assert torch.equal(torch.cat(parts), mix_images(images, WEIGHT))


def test_half_precision_images_are_mixed_in_full(images):
    half = images.bfloat16()
    mixed = mix_images(half, WEIGHT)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, mix_images(half.float(), WEIGHT).bfloat16())


def test_a_pair_with_an_unreadable_image_is_not_mixed():
    valid = torch.tensor([True, True, True, False, False, True, False, False])
    assert torch.equal(keep_whole(WEIGHT, valid), torch.tensor([1.0, 0.5, 1, 1, 1, 1, 1, 1]))


def test_a_micro_batch_that_cuts_a_pair_is_refused_by_name():
    check_pairs(6)
    with pytest.raises(InputError, match=r"data\.mixup .* a micro-batch of 7 .* even train\.micro_batch"):
        check_pairs(7)
