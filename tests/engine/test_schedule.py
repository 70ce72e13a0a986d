"""The learning rate of every step, from the recipe's numbers."""

import pytest

from pretrain.engine.schedule import Schedule
from pretrain.errors import InputError


def test_warm_up_is_linear_from_zero_and_decay_counts_from_its_end():
    rate = Schedule(lr=8e-4, steps=110, warmup_steps=10, decay="linear")
    assert [rate(0), rate(5), rate(10)] == pytest.approx([0.0, 4e-4, 8e-4])
    assert rate(60) == pytest.approx(4e-4)
    assert rate(109) == pytest.approx(8e-6)


def test_cosine_ends_at_the_final_rate():
    rate = Schedule(lr=1.0, steps=100, warmup_steps=0, decay="cosine", final_lr=0.2)
    assert rate(0) == 1.0
    assert rate(50) == pytest.approx(0.6)
    assert rate(100) == pytest.approx(0.2)


def test_imagenet21k_decays_to_1e_5():
    rate = Schedule(lr=1e-3, steps=20_000, warmup_steps=10_000, final_lr=1e-5)
    assert rate(15_000) == pytest.approx(0.5 * (1e-3 + 1e-5))
    assert rate(20_000) == pytest.approx(1e-5)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(InputError, match=r"schedule\.warmup_steps: 100 .* below 100"):
        Schedule(lr=1.0, steps=100, warmup_steps=100)


def test_a_final_rate_above_the_first_is_refused():
    with pytest.raises(InputError, match=r"schedule\.final_lr"):
        Schedule(lr=0.1, steps=100, warmup_steps=0, final_lr=0.2)
