"""A share of the samples that is held out of training: chosen by keys, and the rest is ordered as a set of its own."""

import numpy as np
import pytest
import torch

from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages, TrainImages
from pretrain.index.index import Index
from pretrain.stream.heldout import hold_out
from pretrain.stream.loader import LoaderOptions, TrainLoader, evaluation_batches
from pretrain.stream.order import Order
from pretrain.stream.plan import plan_training

SHARE = 0.1
TRAIN = TrainImages(16, 3, 6)
# crc32 of the key, hashed with the purpose 6, below 0.1 · 2^64.
HELD = [
    *(7, 8, 9, 28, 36, 37, 39, 41, 53, 89, 98, 99, 129),
    *(146, 151, 153, 154, 159, 161, 166, 170, 171, 181, 186, 189),
]


def test_the_choice_never_changes(shards):
    """A run that holds samples out resumes with the same ones, under any later version."""
    _, held = hold_out(shards.index, SHARE)
    assert held.tolist() == HELD


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_every_sample_is_trained_on_or_held_out_and_the_share_is_near(digits, share):
    index = Index.open(digits / "train")
    trained, held = hold_out(index, share)
    assert sorted([*trained, *held]) == list(range(index.samples))
    deviation = (share * (1 - share) / index.samples) ** 0.5
    assert abs(len(held) / index.samples - share) < 4 * deviation


def test_a_larger_share_holds_out_what_a_smaller_one_does(digits):
    index = Index.open(digits / "train")
    few, many = (set(hold_out(index, share)[1].tolist()) for share in (0.05, 0.2))
    assert few < many


def test_the_choice_depends_on_keys_alone(shards, digits):
    """Not on where a sample stands: the same set behind another one holds out the same samples."""
    _, alone = hold_out(shards.index, SHARE)
    first = Index.open(digits / "test")
    _, behind = hold_out(Index.open([digits / "test", shards.folder]), SHARE)
    assert (behind[behind >= first.samples] - first.samples).tolist() == alone.tolist()


@pytest.mark.parametrize(
    ("share", "words"), [(1e-9, "out none of them; a larger"), (0.999999999, "out all of them; a smaller")]
)
def test_a_share_that_leaves_nothing_is_refused(shards, share, words):
    with pytest.raises(InputError, match=rf"data\.held_out: .* of the 203 samples of data\.train holds {words}"):
        hold_out(shards.index, share)


def batches(index, trained, *, rank=0, world=1, micro_batch=4, stop_step=30):
    order = Order(len(trained), 16, seed=6, chunk=8)
    options = LoaderOptions(rank, world, workers=1)
    loader = TrainLoader(index, order, TRAIN, options, micro_batch=micro_batch, stop_step=stop_step, trained=trained)
    return order, list(loader)


def test_each_epoch_trains_on_every_sample_that_is_not_held_out_once(shards):
    trained, _ = hold_out(shards.index, SHARE)
    order, found = batches(shards.index, trained)
    ids = np.concatenate([batch.ids for batch in found])
    for epoch in (0, 1):
        assert sorted(ids[epoch * len(trained) :][: len(trained)]) == trained.tolist()
    assert ids.tolist() == trained[order.at(np.arange(len(ids)))].tolist()


def test_the_batches_are_the_same_on_two_ranks_and_hold_the_images_of_their_ids(shards):
    trained, _ = hold_out(shards.index, SHARE)
    _, alone = batches(shards.index, trained, stop_step=6)
    ranks = [batches(shards.index, trained, rank=rank, world=2, micro_batch=8, stop_step=6)[1] for rank in (0, 1)]
    images = torch.cat([batch.images for batch in alone])
    assert torch.equal(images, torch.cat([batch.images for pair in zip(*ranks, strict=True) for batch in pair]))
    ids = np.concatenate([batch.ids for batch in alone])
    labels = torch.cat([batch.labels for batch in alone])
    assert labels[:, 0].tolist() == [shards.labels[number] for number in ids]
    # The augmentation is that of the canonical id: an epoch without held-out samples has the same image of it.
    whole = TrainLoader(shards.index, Order(203, 1, 6), TRAIN, LoaderOptions(workers=1), micro_batch=1, stop_step=203)
    of_epoch = {int(batch.ids[0]): batch.images[0] for batch in whole}
    assert all(torch.equal(image, of_epoch[int(number)]) for image, number in zip(images, ids, strict=True))


def test_a_chunk_of_what_is_trained_on_is_read_once(shards):
    trained, held = hold_out(shards.index, SHARE)
    opened = [
        chunk for plan in plan_training(Order(len(trained), 16, 6), 4, 0, 1, 0, 11, trained) for chunk in plan.fresh
    ]
    read = np.concatenate([chunk.ids for chunk in opened])
    assert not set(read.tolist()) & set(held.tolist())
    assert len(read) == 11 * 16
    whole = [chunk.ids for chunk in opened if len(chunk.ids) == 8]
    assert len(whole) > 15
    assert all(np.searchsorted(trained, ids[-1]) - np.searchsorted(trained, ids[0]) == 7 for ids in whole)


def test_an_order_of_other_samples_is_refused(shards):
    trained, _ = hold_out(shards.index, SHARE)
    with pytest.raises(InputError, match=f"for 203 samples, to be trained on are {len(trained)}"):
        TrainLoader(shards.index, Order(203, 16, 6), TRAIN, LoaderOptions(), micro_batch=4, trained=trained)
    state = Order(len(trained), 16, 6).state("hash", 3)
    with pytest.raises(InputError, match=f"samples was {len(trained)}, is 203"):
        Order(203, 16, 6).check(state, "hash")


def test_what_is_held_out_is_evaluated_once(shards):
    _, held = hold_out(shards.index, SHARE)
    found = evaluation_batches(shards.index, EvalImages(16, 3), LoaderOptions(workers=1), batch=8, ids=held)
    assert [int(number) for batch in found for number in batch.ids if number >= 0] == held.tolist()
