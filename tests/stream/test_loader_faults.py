"""What a loader hands over where something cannot be read, and where pairs are mixed."""

import os
import queue
import threading

import numpy as np
import pytest
import torch

from pretrain.errors import InputError
from pretrain.images.mixing import Mixing
from pretrain.images.transforms import EvalImages, TrainImages
from pretrain.stream.loader import LoaderOptions, TrainLoader, evaluation_batches
from pretrain.stream.order import Order

SEED = 6
TRAIN = TrainImages(16, 3, SEED)


def train(index, order, *, micro_batch=4, rank=0, world=1, transform=TRAIN, unreadable="raise", **place):
    options = LoaderOptions(rank, world, workers=2, unreadable_chunks=unreadable)
    return TrainLoader(index, order, transform, options, micro_batch=micro_batch, **place)


def evaluate(index, *, batch=4):
    return evaluation_batches(index, EvalImages(16, 3), LoaderOptions(workers=2), batch=batch)


def in_time(work, seconds=20):
    """What `work` returns or raises; a failure, not a hang, if that takes longer."""
    answers: queue.Queue = queue.Queue()

    def run():
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    value, error = answers.get(timeout=seconds)
    if error is not None:
        raise error
    return value


def broken(encoded):
    jpeg = encoded(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8), "JPEG")
    return jpeg[: len(jpeg) // 2]


@pytest.mark.parametrize("world", [1, 2])
def test_an_unreadable_image_is_grey_and_masked_and_shifts_nothing(write_shards, encoded, world):
    whole = write_shards("whole", [60]).index
    damaged = write_shards("damaged", [60], replace={17: broken(encoded), 18: b"no image at all"}).index
    order, masked = Order(60, 12, SEED), 0
    for rank in range(world):
        options = {"micro_batch": 6, "rank": rank, "world": world, "stop_step": 10}
        for batch, other in zip(train(damaged, order, **options), train(whole, order, **options), strict=True):
            assert np.array_equal(batch.ids, other.ids)
            assert torch.equal(batch.labels, other.labels)
            assert batch.valid.tolist() == [u not in (17, 18) for u in batch.ids]
            assert torch.equal(batch.images[batch.valid], other.images[batch.valid])
            assert (batch.images[~batch.valid] == 128).all()
            masked += int((~batch.valid).sum())
    assert masked == 4


def test_faults_come_with_the_batch_they_are_in_and_are_counted(write_shards, encoded):
    shards = write_shards("damaged", [30], replace={17: broken(encoded), 20: b"not an image"})
    index = shards.index
    with evaluate(index) as batches:
        found = {}
        for batch in batches:
            assert [fault.sample_id for fault in batch.faults] == batch.ids[
                (batch.ids >= 0) & ~batch.valid.numpy()
            ].tolist()
            found.update({fault.sample_id: fault for fault in batch.faults})
    assert sorted(found) == [17, 20]
    assert (batches.counters.unreadable, batches.counters.images) == (2, 30)
    (place,) = index.extents([20])
    assert found[20].record(index) == {
        "id": 20,
        "epoch": 0,
        "key": shards.keys[20],
        "url": str(shards.shard(0)),
        "offset": place.begin,
        "error": "not JPEG, PNG or WebP but a text: 12 bytes that begin '6e 6f 74 20 61 6e 20 69'",
    }
    assert found[17].reason.startswith("cut off in the header")
    assert not found[17].of_chunk
    assert (
        found[20].describe(index).startswith(f"{shards.shard(0)}, byte {place.begin}: sample 20 (sample/000020): not")
    )


def test_a_chunk_that_cannot_be_read_may_be_masked_and_shifts_nothing(write_shards):
    whole, damaged = write_shards("whole", [40, 40]), write_shards("cut", [40, 40])
    index, order = damaged.index, Order(80, 16, SEED)
    os.truncate(damaged.shard(1), index.extents([60])[0].begin + 700)
    lost = set()
    for batch, other in zip(
        train(index, order, micro_batch=16, stop_step=10, unreadable="mask"),
        train(whole.index, order, micro_batch=16, stop_step=10),
        strict=True,
    ):
        assert np.array_equal(batch.ids, other.ids)
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.images[batch.valid], other.images[batch.valid])
        assert (batch.images[~batch.valid] == 128).all()
        assert [fault.sample_id for fault in batch.faults] == batch.ids[~batch.valid.numpy()].tolist()
        assert all(fault.of_chunk and "truncated" in fault.reason for fault in batch.faults)
        lost |= {fault.sample_id for fault in batch.faults}
    assert lost == set(range(56, 80))  # 60 is cut, and a chunk of eight is whole or not there


def test_an_error_of_the_transform_itself_is_not_taken_for_a_bad_image(shards):
    class Mistaken:
        image_size, channels = 16, 3

        def __call__(self, image, epoch, sample_id):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(train(shards.index, Order(203, 16, SEED), transform=Mistaken()))


def test_a_damaged_shard_raises_at_its_batch_and_ever_after_and_never_hangs(write_shards):
    shards = write_shards("cut", [40, 40])
    index = shards.index
    os.truncate(shards.shard(1), 1024)
    batches = evaluate(index, batch=8)

    got = []

    def consume():
        for batch in batches:
            got.append(batch.ids)

    with pytest.raises(InputError, match="truncated") as caught:
        in_time(consume)
    assert np.concatenate(got).tolist() == list(range(40))
    assert caught.value.only_this_rank
    with pytest.raises(InputError, match="truncated"):
        next(batches)


@pytest.mark.parametrize("mixing", [Mixing(0.2, 0.0, 16, SEED), Mixing(0.2, 1.0, 16, SEED)])
def test_every_row_is_mixed_alike_whatever_the_topology_and_faulty_pairs_are_left_alone(mixing, write_shards):
    index = write_shards("mixed", [60], replace={17: b"not an image"}).index
    order = Order(60, 12, SEED)

    def drawn(micro_batch, world):
        """weight [12, 10] and boxes [12, 10, 4]: by slot and step."""
        ranks = []
        for rank in range(world):
            options = {"micro_batch": micro_batch, "rank": rank, "world": world, "stop_step": 10, "mixing": mixing}
            with train(index, order, **options) as loader:
                batches = list(loader)
            whole = [
                (batch.weight, torch.zeros(micro_batch, 4) if batch.boxes is None else batch.boxes) for batch in batches
            ]
            ranks.append([torch.cat(parts).unflatten(0, (10, -1)) for parts in zip(*whole, strict=True)])
        return [torch.cat(parts, dim=1) for parts in zip(*ranks, strict=True)]

    weight, boxes = drawn(12, 1)
    assert all(torch.equal(one, other) for one, other in zip(drawn(2, 3), (weight, boxes), strict=True))
    epochs = np.array([order.epochs(step) for step in range(10)])
    ids = np.array([order.ids(step) for step in range(10)])
    expected, cut = mixing.draw(epochs.ravel(), ids.ravel())
    expected, cut = expected.view(10, 12), torch.zeros(10, 12, 4) if cut is None else cut.view(10, 12, 4)
    for step, row in np.argwhere(ids == 17).tolist():
        expected[step, [row, row ^ 1]] = 1
        cut[step, [row, row ^ 1]] = 0
    assert torch.equal(weight, expected)
    assert torch.equal(boxes, cut)
    assert boxes.any() == bool(mixing.cutmix)
    assert weight.min() < weight.max() <= 1
