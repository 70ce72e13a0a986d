"""Killed and changed at any step, the stream goes on with the identical batches: none lost, none twice, none moved."""

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest

from pretrain.images.transforms import TrainImages
from pretrain.stream.loader import LoaderOptions, TrainLoader
from pretrain.stream.order import Order

BATCH, STEPS, KILLS = 24, 150, 50  # 17 epochs of 203 samples
IMAGES = TrainImages(8, 3, seed=4)


def global_batches(index, order, start, *, world, workers, stop=STEPS):
    """(ids, a hash of the pixels) of each step from `start` on, the ranks' parts joined."""
    loaders = [
        TrainLoader(
            index,
            order,
            IMAGES,
            LoaderOptions(rank, world, workers),
            micro_batch=BATCH // world // (2 if world < 3 else 1),
            start_step=start,
            stop_step=stop,
        )
        for rank in range(world)
    ]
    try:
        for _ in range(start, stop):
            parts = [next(loader) for loader in loaders for _ in range(BATCH // world // loader.rows)]
            pixels = hashlib.sha256(b"".join(part.images.numpy().tobytes() for part in parts)).hexdigest()
            yield [u for part in parts for u in part.ids.tolist()], pixels
    finally:
        for loader in loaders:
            loader.close()


def fingerprint(steps):
    return hashlib.sha256(json.dumps(list(enumerate(steps))).encode()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(shards):
    return list(global_batches(shards.index, Order(203, BATCH, seed=4), 0, world=1, workers=1))


def test_fifty_kills_and_changes_of_ranks_and_threads_leave_the_sequence_as_it_was(shards, undisturbed):
    """Between kills: another world (1 → 2 → 4 → 3 → …), other threads; a run is killed ahead of its last save."""
    draw = random.Random(0)
    index, state, trained = shards.index, None, []
    kills = sorted(draw.sample(range(1, STEPS), KILLS))
    for number, kill in enumerate([*kills, STEPS]):
        order = Order(203, BATCH, seed=4)
        saved = order.check(json.loads(state), index.hash) if state else 0
        del trained[saved:]  # what a killed run trained on after its last save never counted
        batches = global_batches(index, order, saved, world=(1, 2, 4, 3)[number % 4], workers=draw.randint(1, 3))
        for step, batch in enumerate(batches, saved):
            trained.append(batch)
            if (step + 1) % 4 == 0:
                state = json.dumps(order.state(index.hash, step + 1))
            if step + 1 >= kill:
                break
        batches.close()
    assert number == KILLS
    assert fingerprint(trained) == fingerprint(undisturbed)
    seen = Counter((place // 203, u) for place, u in enumerate(u for ids, _ in trained for u in ids))
    whole = STEPS * BATCH // 203
    assert sorted(seen)[: whole * 203] == [(epoch, u) for epoch in range(whole) for u in range(203)]
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("sizes", [[1] * 13, [2, 1, 1], [100, 1, 1, 1], [7]], ids=str)
def test_shards_may_be_uneven_or_fewer_than_the_ranks(write_shards, sizes):
    index = write_shards("uneven", sizes).index
    order = Order(index.samples, 12, seed=0)
    for world in (1, 3, 4, 12):
        ranks = [
            np.concatenate(
                [
                    batch.ids[None]
                    for batch in TrainLoader(
                        index,
                        order,
                        IMAGES,
                        LoaderOptions(rank, world, workers=1),
                        micro_batch=12 // world,
                        stop_step=9,
                    )
                ]
            )
            for rank in range(world)
        ]
        assert np.array_equal(np.concatenate(ranks, axis=1), [order.ids(step) for step in range(9)])
