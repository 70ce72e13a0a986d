"""The learning rate of every step, from the recipe's numbers; the decay of the average of every update."""

import pytest
import torch

from pretrain.engine.schedule import Averaging, AveragingSection, Schedule, ScheduleSection
from pretrain.errors import InputError


def test_warm_up_is_linear_from_zero_and_decay_counts_from_its_end():
    rate = Schedule(ScheduleSection(warmup_steps=10, decay="linear"), 8e-4, 110)
    assert [rate(0), rate(5), rate(10)] == pytest.approx([0.0, 4e-4, 8e-4])
    assert rate(60) == pytest.approx(4e-4)
    assert rate(109) == pytest.approx(8e-6)


def test_cosine_ends_at_the_final_rate():
    rate = Schedule(ScheduleSection(warmup_steps=0, decay="cosine", final_lr=0.2), 1.0, 100)
    assert rate(0) == 1.0
    assert rate(50) == pytest.approx(0.6)
    assert rate(100) == pytest.approx(0.2)


def test_imagenet21k_decays_to_1e_5():
    rate = Schedule(ScheduleSection(warmup_steps=10_000, final_lr=1e-5), 1e-3, 20_000)
    assert rate(15_000) == pytest.approx(0.5 * (1e-3 + 1e-5))
    assert rate(20_000) == pytest.approx(1e-5)


def test_a_warm_up_longer_than_the_run_is_cut_off_with_it():
    rate = Schedule(ScheduleSection(warmup_steps=1000), 1.0, 10)
    assert [rate(step) for step in range(10)] == pytest.approx([step / 1000 for step in range(10)])
    assert Schedule(ScheduleSection(warmup_steps=10), 1.0, 10)(10) == 1.0


def test_a_final_rate_above_the_first_is_refused():
    with pytest.raises(InputError, match=r"schedule\.final_lr"):
        Schedule(ScheduleSection(warmup_steps=0, final_lr=0.2), 0.1, 100)


# The average


def averaging(**said: object) -> Averaging:
    return Averaging(AveragingSection(**said))


def averaged(weights: torch.Tensor, start: torch.Tensor, decay_of: Averaging) -> torch.Tensor:
    """`weights` [t, n], those after each update, as the optimizer averages them."""
    average = start.clone()
    for updates, now in enumerate(weights):
        average.lerp_(now, 1.0 - decay_of(updates))
    return average


@pytest.mark.parametrize("start_step", [0, 3])
@pytest.mark.parametrize(("decay", "updates"), [(0.5, 5), (0.9, 60), (0.9999, 700), (0.9999, 30_000), (0.0, 7)])
def test_the_average_is_the_sum_it_is_said_to_be_whatever_it_began_from(decay, updates, start_step):
    weights = torch.randn(updates + start_step, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    since = weights[start_step:]
    shares = (1 - decay) * decay ** torch.arange(updates - 1, -1, -1, dtype=torch.float64) / (1 - decay**updates)
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    for start in (0.0, 1e6):
        found = averaged(
            weights,
            torch.full((3,), start, dtype=torch.float64),
            averaging(decay=decay, start_step=start_step),
        )
        assert torch.allclose(found, shares @ since, rtol=0, atol=1e-11), start


def test_after_few_steps_from_a_head_of_zeros_the_average_is_the_mean_of_the_weights():
    weights = torch.linspace(1.0, 2.0, 50, dtype=torch.float64)[:, None]  # after each of 50 updates
    zeros = torch.zeros(1, dtype=torch.float64)
    assert averaged(weights, zeros, averaging(decay=0.9999)) == pytest.approx(1.5, rel=1e-3)
    assert averaged(weights, zeros, averaging(decay=0.9999, debias=False)) == pytest.approx(0.0075, rel=1e-2)


def test_the_first_update_replaces_what_the_average_began_from():
    assert averaging(decay=0.9999)(0) == 0.0
    assert [averaging(decay=0.9, start_step=2)(updates) for updates in range(4)] == pytest.approx([0, 0, 0, 0.9 / 1.9])
    assert [averaging(decay=0.9, start_step=2, debias=False)(updates) for updates in range(4)] == [0, 0, 0.9, 0.9]
    assert averaging(decay=0.9999)(10**6) == pytest.approx(0.9999, abs=1e-12)
