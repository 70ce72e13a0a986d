"""Keyed hashing: fixed for ever, because orders and augmentations of running jobs hang on it."""

import numpy as np
import pytest

from pretrain.hashing import AUGMENT, Draws, hash_words, mix64, stream64


def test_the_stream_is_splitmix64_as_published():
    # The reference implementation's first outputs for the seed 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert stream64(np.array([1234567], np.uint64), np.arange(5, dtype=np.uint64)).tolist() == published


def test_hashes_of_tuples_never_change():
    assert [f"{int(hash_words(*words)[0]):016x}" for words in [(0,), (1, 2), (2, 1), (1, 2, 3, 4)]] == [
        "a706dd2f4d197e6f",
        "2ac0e9440f013026",
        "d97053e055db5484",
        "62fee7847c6c57d3",
    ]


def test_draws_never_change():
    draws = Draws(seed=7, epoch=3, sample_id=299_999_999)
    assert [draws.uniform() for _ in range(3)] == [
        0.7678376158566779,
        0.33716889656438975,
        0.21222945898545842,
    ]
    assert draws.below(1000) == 825


def test_draws_are_the_stream_of_the_hashed_key():
    state = hash_words(AUGMENT, 7, 3, 12345)
    draws = Draws(7, 3, 12345)
    expected = (stream64(state, np.arange(4, dtype=np.uint64)) >> np.uint64(11)).astype(float) * 2.0**-53
    assert [draws.uniform() for _ in range(4)] == expected.tolist()


def test_mixing_is_a_bijection_in_which_one_bit_changes_half_of_the_bits():
    words = hash_words(np.arange(1 << 16))
    assert len(np.unique(mix64(words))) == 1 << 16
    for bit in (0, 17, 63):
        flipped = mix64(words) ^ mix64(words ^ np.uint64(1 << bit))
        mean = np.unpackbits(flipped.view(np.uint8)).mean()
        assert mean == pytest.approx(0.5, abs=0.005)


def test_hashing_broadcasts_as_if_word_by_word():
    grid = hash_words(5, np.arange(3)[:, None], np.arange(4))
    assert grid.shape == (3, 4)
    assert all(grid[i, j] == hash_words(5, i, j)[0] for i in range(3) for j in range(4))


def test_any_part_of_the_key_changes_the_draws():
    first = {Draws(*key).uniform() for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1)]}
    assert len(first) == 5


def test_draws_are_uniform_between_their_bounds():
    draws = Draws(0, 0, 0)
    numbers = np.array([draws.uniform(2.0, 5.0) for _ in range(20_000)])
    assert numbers.min() >= 2
    assert numbers.max() < 5
    assert np.histogram(numbers, 10, (2, 5))[0] == pytest.approx(2000, rel=0.1)
    counts = np.bincount([draws.below(7) for _ in range(14_000)])
    assert len(counts) == 7
    assert counts == pytest.approx(2000, rel=0.1)


def test_neighbouring_samples_and_epochs_draw_independently():
    table = np.array([[Draws(1, epoch, u).uniform() for u in range(200)] for epoch in range(50)])
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.04
