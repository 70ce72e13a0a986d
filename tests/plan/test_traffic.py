"""What ranks send each other, against the formulas that ZeRO's authors give."""

from dataclasses import replace

import pytest

from pretrain.plan.traffic import Collective, Exchange, Fabric, bytes_sent, collectives, seconds_of, traffic

P = 632_000_000
FABRIC = Fabric(within=300e9, between=100e9)
RANKS = [(1, 8), (2, 8), (8, 8), (32, 8), (128, 8)]


@pytest.mark.parametrize(("kind", "share"), [("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1)])
def test_a_ring_sends_what_the_formula_says(kind, share):
    assert bytes_sent(Collective("gradients", kind, 800, 1), 8) == share * 7 / 8 * 800
    assert bytes_sent(Collective("gradients", kind, 800, 1), 1) == 0


def test_stages_0_to_2_send_as_much_as_data_parallelism_and_stage_3_half_as_much_again():
    """Rajbhandari et al. 2020, §7, where gradients are reduced once and in the type of the parameters."""
    sent = {}
    for stage in range(4):
        exchange = Exchange(stage, P, 2, 2, scattered=stage == 2)
        sent[stage] = sum(bytes_sent(one, 64) for one in collectives(exchange))
    once = 63 / 64 * 2 * P
    assert sent[0] == pytest.approx(2 * once)
    assert sent[2] == pytest.approx(2 * once)
    assert sent[3] == pytest.approx(3 * once)
    # DeepSpeed's stage 1 all-reduces, though each rank needs its part alone.
    assert sent[1] == pytest.approx(3 * once)


@pytest.mark.parametrize("stage", range(4))
def test_which_stages_exchange_for_each_micro_batch(stage):
    one, four = (traffic(Exchange(stage, P, 2, 4, accumulation=accumulation), 8, 8, FABRIC) for accumulation in (1, 4))
    assert four.gradients == pytest.approx(one.gradients * (4 if stage >= 2 else 1))
    assert four.parameters == pytest.approx(one.parameters * (4 if stage == 3 else 1))


def test_parameters_that_are_kept_for_the_backward_pass_are_gathered_once():
    twice = traffic(Exchange(3, P, 2, 4), 8, 8, FABRIC)
    once = traffic(Exchange(3, P, 2, 4, gathers=1), 8, 8, FABRIC)
    assert twice.parameters == pytest.approx(2 * once.parameters)
    assert twice.gradients == once.gradients


@pytest.mark.parametrize("stage", range(4))
def test_more_ranks_never_take_less_time(stage):
    times = [traffic(Exchange(stage, P, 2, 4, parts=35), *ranks, FABRIC).seconds for ranks in RANKS]
    assert times == sorted(times)


def test_the_slower_of_the_two_networks_tells():
    one = Collective("gradients", "all_reduce", 4 * P, 1)
    fast = replace(FABRIC, between=1e15)
    assert seconds_of(one, 8, 8, FABRIC) == pytest.approx(2 * 63 / 64 * 4 * P / 100e9, rel=0.01)
    assert seconds_of(one, 8, 8, fast) == pytest.approx(2 * 63 / 64 * 4 * P / 300e9, rel=0.01)
    assert seconds_of(one, 1, 1, FABRIC) == 0


def test_small_collectives_take_their_latency():
    tiny = Collective("parameters", "all_gather", 1000, 1)
    around = 8 * 7 * FABRIC.latency_within + 7 * FABRIC.latency_between
    assert seconds_of(tiny, 8, 8, FABRIC) == pytest.approx(FABRIC.call + around, rel=0.01)
    assert seconds_of(replace(tiny, calls=10), 8, 8, FABRIC) == pytest.approx(10 * (FABRIC.call + around), rel=0.01)
