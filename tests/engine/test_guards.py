"""Which updates are skipped, and what follows when they are too many."""

import json
import math

import pytest

from pretrain.engine.guards import Guard, GuardSection, RollBack
from pretrain.errors import DivergedError


def feed(guard, losses, start=0):
    """Let the guard decide on steps with these losses; the steps whose update it refuses."""
    refused = []
    for step, loss in enumerate(losses, start=start):
        reason = guard.refuses(step, loss)
        refused += [step] if reason else []
        guard.note(step, loss, 1.0, reason)
    return refused


def noisy(count, level=1.0):
    return [level + 0.01 * math.sin(7 * step) for step in range(count)]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_named(loss):
    assert Guard(GuardSection()).refuses(0, loss) == f"the loss is {loss}"
    assert Guard(GuardSection()).refuses(0, 1e30) is None


def test_skips_in_a_row_end_the_run_and_an_update_between_them_starts_the_count_anew():
    guard = Guard(GuardSection(skips=3))
    assert feed(guard, [math.nan, math.nan, 2.0, math.nan, math.nan]) == [0, 1, 3, 4]
    assert guard.skipped == 4
    with pytest.raises(
        DivergedError, match=r"step 6: the loss is nan .*3 updates in a row were skipped, from step 4 on"
    ):
        feed(guard, [math.nan], start=5)


def test_a_gradient_that_is_not_finite_counts_as_a_loss_does():
    guard = Guard(GuardSection(skips=2))
    guard.note(0, 1.0, math.inf, "the gradient norm is inf")
    with pytest.raises(DivergedError, match=r"step 2: the gradient norm is inf \(loss 1, gradient norm inf\)"):
        guard.note(1, 1.0, math.inf, "the gradient norm is inf")


def test_a_spike_is_refused_only_where_it_is_asked_for_and_once_there_are_losses_to_compare_with():
    assert feed(Guard(GuardSection()), [*noisy(80), 9.0]) == []
    assert feed(Guard(GuardSection(spike=5)), [*noisy(49), 9.0]) == []
    assert feed(Guard(GuardSection(spike=5)), [*noisy(50), 9.0]) == [50]


def test_what_is_within_the_spread_is_no_spike():
    # Around 1 with a deviation of 0.007, which counts as 0.01: the limit is at 1.05.
    assert feed(Guard(GuardSection(spike=5)), [*noisy(100), 1.04]) == []
    assert feed(Guard(GuardSection(spike=5)), [*noisy(100), 1.06]) == [100]
    assert feed(Guard(GuardSection(spike=5)), [*[1.0] * 100, 1.0001]) == []  # a plateau: no spread at all
    assert feed(Guard(GuardSection(spike=5)), [4 * 0.99**step for step in range(300)]) == []  # falling


def test_a_refused_spike_does_not_widen_what_is_allowed_and_old_losses_are_forgotten():
    guard = Guard(GuardSection(spike=5, skips=2))
    feed(guard, noisy(60))
    assert feed(guard, [9.0, 1.0, 3.0, 1.0, 9.0], start=60) == [60, 62, 64]
    falls = Guard(GuardSection(spike=5))
    feed(falls, [*noisy(100, level=100.0), *noisy(100, level=1.0)])
    assert falls.refuses(200, 2.0)  # of the first hundred nothing is left


def test_a_roll_back_avoids_the_steps_before_the_streak_too():
    guard = Guard(GuardSection(skips=2, then="rollback", margin=4))
    before = guard.state()
    with pytest.raises(RollBack) as back:
        feed(guard, [*noisy(10), math.nan, math.nan])
    assert (back.value.first, back.value.last) == (6, 11)
    assert "going back, steps 7 to 12 make no update" in str(back.value)
    guard.restore(before)
    assert feed(guard, noisy(20)) == [6, 7, 8, 9, 10, 11]
    assert guard.skipped == 6


def test_avoided_steps_are_no_streak_whatever_their_loss():
    guard = Guard(GuardSection(skips=2, then="rollback", margin=0))
    with pytest.raises(RollBack):
        feed(guard, [1.0, math.nan, math.nan])
    assert feed(guard, [math.nan, math.nan, 1.0, math.nan], start=1) == [1, 2, 4]


def test_the_range_avoided_begins_with_the_run_at_the_earliest():
    with pytest.raises(RollBack) as back:
        feed(Guard(GuardSection(skips=2, then="rollback", margin=100)), [1.0, math.nan, math.nan])
    assert (back.value.first, back.value.last) == (0, 2)


def test_a_run_goes_back_only_so_often():
    guard = Guard(GuardSection(skips=1, then="rollback", margin=0, rollbacks=2))
    for step in (3, 5):
        with pytest.raises(RollBack):
            feed(guard, [math.nan], start=step)
    with pytest.raises(DivergedError, match="after 2 roll-backs"):
        feed(guard, [math.nan], start=7)


def test_a_resumed_run_decides_as_the_undisturbed_one():
    losses = [*noisy(60), 9.0, *noisy(30), 1.045, math.nan, 9.0, *noisy(40), 1.06, 1.04, 9.0]
    whole = Guard(GuardSection(spike=5, skips=3))
    expected = feed(whole, losses)
    assert len(expected) >= 4
    for cut in (1, 60, 61, 92, 93, 134):
        first, second = Guard(GuardSection(spike=5, skips=3)), Guard(GuardSection(spike=5, skips=3))
        refused = feed(first, losses[:cut])
        second.restore(json.loads(json.dumps(first.state())))
        assert refused + feed(second, losses[cut:], start=cut) == expected
        assert second.state() == whole.state()


def test_a_streak_goes_on_over_a_resume():
    first, second = Guard(GuardSection(skips=3)), Guard(GuardSection(skips=3))
    feed(first, [1.0, math.nan, math.nan])
    assert not first.calm(99)
    second.restore(first.state())
    with pytest.raises(DivergedError, match="from step 2 on"):
        feed(second, [math.nan], start=3)


def test_what_is_avoided_outlives_going_back_and_resuming():
    guard = Guard(GuardSection(skips=1, then="rollback", margin=1))
    start = guard.state()
    for step in (4, 8):
        with pytest.raises(RollBack):
            feed(guard, [math.nan], start=step)
        guard.restore(start)
    assert guard.avoided == [(3, 4), (7, 8)]
    later = Guard(GuardSection(skips=1, then="rollback", margin=1))
    later.restore(json.loads(json.dumps(guard.state())))
    assert feed(later, noisy(10)) == [3, 4, 7, 8]
