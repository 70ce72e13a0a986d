"""Support sets: protocol step 3."""

import hashlib

import numpy as np
import pytest

from fewshot.task import draw_support
from pretrain.errors import InputError


@pytest.fixture
def labels():
    return np.random.default_rng(7).integers(0, 6, 400)


def test_a_draw_is_the_protocol_word_for_word(labels):
    draws = {(draw.shots, draw.seed): draw for draw in draw_support(labels, classes=6, shots=(1, 5, 25), seeds=(0, 3))}
    for seed in (0, 3):
        generator = np.random.default_rng(seed)
        by_class = [generator.permutation(np.where(labels == c)[0]) for c in range(6)]
        for shots in (1, 5, 25):
            expected = np.concatenate([members[:shots] for members in by_class])
            assert draws[shots, seed].ids.tolist() == expected.tolist()


def test_draws_are_pinned():
    (draw,) = draw_support(np.arange(40) % 4, classes=4, shots=[3], seeds=[0])
    assert draw.ids.tolist() == [16, 24, 8, 9, 37, 13, 22, 18, 38, 19, 23, 31]
    assert draw.sha256 == "daebbcba055ffcb52a53d1c18b39ee86d384577e130dd6c8d3369a8d378659ff"


def test_the_hash_is_of_little_endian_int64_in_the_order_drawn(labels):
    (draw,) = draw_support(labels, classes=6, shots=[2], seeds=[1])
    packed = b"".join(int(id).to_bytes(8, "little", signed=True) for id in draw.ids)
    assert draw.sha256 == hashlib.sha256(packed).hexdigest()


def test_shots_are_nested_class_by_class(labels):
    few, many = draw_support(labels, classes=6, shots=(2, 9), seeds=[0])
    assert np.array_equal(few.ids.reshape(6, 2), many.ids.reshape(6, 9)[:, :2])
    assert np.array_equal(labels[many.ids], many.labels)
    assert np.array_equal(many.labels, np.repeat(np.arange(6), 9))


def test_the_order_of_the_rows_does_not_matter(labels):
    ids = np.random.default_rng(1).choice(10_000, len(labels), replace=False)
    shuffled = np.random.default_rng(2).permutation(len(labels))
    straight = draw_support(labels, ids=ids, classes=6, shots=(1, 5), seeds=(0, 1))
    mixed = draw_support(labels[shuffled], ids=ids[shuffled], classes=6, shots=(1, 5), seeds=(0, 1))
    assert [draw.ids.tolist() for draw in straight] == [draw.ids.tolist() for draw in mixed]


def test_a_seed_draws_the_same_whatever_is_drawn_beside_it(labels):
    (single,) = draw_support(labels, classes=6, shots=[5], seeds=[2])
    among = draw_support(labels, classes=6, shots=(1, 5, 10), seeds=(0, 1, 2))
    assert single.ids.tolist() == next(d for d in among if (d.shots, d.seed) == (5, 2)).ids.tolist()


def test_seeds_differ(labels):
    first, second = draw_support(labels, classes=6, shots=[5], seeds=(0, 1))
    assert first.ids.tolist() != second.ids.tolist()


def test_classes_with_too_few_images_are_named():
    labels = np.repeat([0, 1, 3], [9, 2, 5])
    with pytest.raises(InputError, match=r"data\.support X: 5 shots.*class 1 has 2, class 2 has 0") as caught:
        draw_support(labels, classes=4, shots=(1, 5), seeds=[0], where="data.support X")
    assert "class 3" not in str(caught.value)


def test_the_most_shots_that_would_do_are_told():
    with pytest.raises(InputError, match="at most 2 shots"):
        draw_support(np.repeat([0, 1], [9, 2]), classes=2, shots=[3], seeds=[0])
