"""Plans: each rank's part of the order, and every chunk read once."""

import numpy as np
import pytest

import pretrain.stream.plan as plan_module
from pretrain.stream.order import Order
from pretrain.stream.plan import plan_evaluation, plan_training

ORDERS = [
    # samples, global batch, chunk, lanes
    (203, 16, 8, None),
    (203, 16, 8, 64),
    (203, 12, 5, 7),
    (1797, 32, 8, None),
    (5, 12, 8, None),
    (1, 4, 8, None),
    (40, 8, 1, 3),
]


@pytest.fixture(params=[24, 4096])
def planned_at_once(request, monkeypatch):
    """How many positions are planned together: chunks go on from one such block to the next, or not."""
    monkeypatch.setattr(plan_module, "_PLANNED_AT_ONCE", request.param)


@pytest.mark.usefixtures("planned_at_once")
@pytest.mark.parametrize(("samples", "batch", "chunk", "lanes"), ORDERS)
@pytest.mark.parametrize("world", [1, 4])
def test_a_plan_is_the_ranks_part_of_the_order(samples, batch, chunk, lanes, world):
    order = Order(samples, batch, seed=3, chunk=chunk, lanes=lanes)
    share = batch // world
    for rank in {0, world - 1}:
        for micro in {1, share}:
            plans = list(plan_training(order, micro, rank, world, 5, 25))
            ids = np.concatenate([plan.ids for plan in plans])
            epochs = np.concatenate([plan.epochs for plan in plans])
            begin, end = rank * share, (rank + 1) * share
            assert ids.tolist() == [u for step in range(5, 25) for u in order.ids(step, begin, end)]
            assert epochs.tolist() == [e for step in range(5, 25) for e in order.epochs(step, begin, end)]
            assert all(len(plan.ids) == micro for plan in plans)


@pytest.mark.usefixtures("planned_at_once")
@pytest.mark.parametrize(("samples", "batch", "chunk", "lanes"), ORDERS)
@pytest.mark.parametrize("world", [1, 2])
def test_each_chunk_is_read_once_and_holds_just_what_the_rank_takes_from_it(samples, batch, chunk, lanes, world):
    order = Order(samples, batch, seed=3, chunk=chunk, lanes=lanes)
    for rank in range(world):
        opened, uses = [], {}
        for plan in plan_training(order, 1, rank, world, 5, 40):
            opened += plan.fresh
            (taken,) = plan.chunks
            assert any(taken is known for known in opened), "a chunk is opened before it is used"
            uses.setdefault(id(taken), []).append(int(plan.ids[0]))
        assert len({id(fresh) for fresh in opened}) == len(opened)
        for fresh in opened:
            assert fresh.ids.tolist() == sorted(uses[id(fresh)])
        whole = [fresh for fresh in opened if len(fresh.ids) == chunk]
        if lanes is None and samples > 1000 and world == 1:
            assert len(whole) > 0.7 * len(opened)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 11, 12, 13, 100])
def test_an_evaluation_takes_every_id_once_and_each_rank_as_many_batches(world, count):
    ids = np.random.default_rng(0).permutation(200)[:count]
    plans = [list(plan_evaluation(ids, 4, rank, world)) for rank in range(world)]
    assert len({len(of_rank) for of_rank in plans}) == 1
    in_order = [plan for step in zip(*plans, strict=True) for plan in step]
    rows = [int(u) for plan in in_order for u in plan.ids]
    assert rows == ids.tolist() + [-1] * (len(rows) - count)
    assert len(rows) - count < 4 * world
    for plan in in_order:
        assert [chunk is None for chunk in plan.chunks] == (plan.ids < 0).tolist()
        assert [u for chunk in plan.fresh for u in chunk.ids] == plan.ids[plan.ids >= 0].tolist()
