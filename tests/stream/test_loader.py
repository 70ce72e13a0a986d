"""The loader: one global batch whatever the topology, exact restarts, threads that end."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch

from pretrain.errors import InputError
from pretrain.images.decode import decode
from pretrain.images.transforms import EvalImages, SquashImages, TrainImages, to_float
from pretrain.stream.loader import LoaderOptions, TrainLoader, evaluation_batches
from pretrain.stream.order import Order

SEED = 6
TRAIN = TrainImages(16, 3, SEED)


def train(index, order, *, micro_batch=4, rank=0, world=1, workers=2, transform=TRAIN, **options):
    place = {name: options.pop(name) for name in ("start_step", "stop_step", "mixing") if name in options}
    options = LoaderOptions(rank, world, workers, **options)
    return TrainLoader(index, order, transform, options, micro_batch=micro_batch, **place)


def evaluate(index, *, batch=4, rank=0, world=1, ids=None):
    return evaluation_batches(index, EvalImages(16, 3), LoaderOptions(rank, world, workers=2), batch=batch, ids=ids)


def steps_of(index, order, start, stop, *, micro_batch=4, world=1, workers=2, transform=TRAIN):
    """Global batches of steps [start, stop), ranks and micro-batches joined: (ids, images, labels, valid)."""
    per_step = order.global_batch // world // micro_batch
    ranks = []
    for rank in range(world):
        options = {"micro_batch": micro_batch, "rank": rank, "world": world, "workers": workers}
        batches = list(train(index, order, **options, transform=transform, start_step=start, stop_step=stop))
        assert len(batches) == (stop - start) * per_step
        assert all(len(batch.ids) == micro_batch for batch in batches)
        ranks.append(batches)
    steps = []
    for step in range(stop - start):
        rows = [batch for of_rank in ranks for batch in of_rank[step * per_step : (step + 1) * per_step]]
        steps.append(
            (
                np.concatenate([batch.ids for batch in rows]),
                torch.cat([batch.images for batch in rows]),
                torch.cat([batch.labels for batch in rows]),
                torch.cat([batch.valid for batch in rows]),
            )
        )
    return steps


def assert_same(steps, others):
    assert len(steps) == len(others)
    for step, other in zip(steps, others, strict=True):
        assert np.array_equal(step[0], other[0])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(step[1:], other[1:], strict=True))


def stream_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("read", "decode"))]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not stream_threads()


# The same batches everywhere


@pytest.fixture(scope="module")
def reference(shards):
    """Steps 10 to 40 of batches of 16, over the end of the first and the second epoch."""
    return steps_of(shards.index, Order(203, 16, SEED), 10, 40, micro_batch=16, workers=1)


@pytest.mark.parametrize(
    ("world", "micro_batch", "workers"),
    [(1, 16, 3), (1, 1, 2), (2, 8, 1), (2, 4, 2), (4, 2, 5), (16, 1, 1)],
)
def test_the_global_batch_is_the_same_for_any_ranks_micro_batch_and_workers(
    shards, reference, world, micro_batch, workers
):
    others = steps_of(shards.index, Order(203, 16, SEED), 10, 40, world=world, micro_batch=micro_batch, workers=workers)
    assert_same(others, reference)


def test_a_batch_is_the_order_its_labels_and_its_keyed_crops(shards, reference):
    order = Order(203, 16, SEED)
    for step, (ids, images, labels, valid) in enumerate(reference, 10):
        assert ids.dtype == np.int64
        assert np.array_equal(ids, order.ids(step))
        assert labels.tolist() == [[shards.labels[u]] for u in ids]
        assert (labels.dtype, valid.dtype, images.dtype) == (torch.int64, torch.bool, torch.uint8)
        assert valid.all()
        for row in (0, 7, 15):
            expected = TRAIN(decode(shards.images[ids[row]], 3), int(order.epochs(step)[row]), int(ids[row]))
            assert torch.equal(images[row], expected)


@pytest.mark.parametrize("start", [11, 12, 25, 26, 39])
def test_starting_at_any_step_gives_the_rest_of_the_same_stream(shards, reference, start):
    assert_same(steps_of(shards.index, Order(203, 16, SEED), start, 40, world=2), reference[start - 10 :])


def test_epochs_are_exact_and_batches_run_over_their_ends(write_shards):
    index = write_shards("small", [29, 30]).index
    # 59 steps of 8 are 8 epochs to the sample.
    steps = steps_of(index, Order(59, 8, SEED), 0, 59, world=2, micro_batch=4)
    for epoch in np.concatenate([ids for ids, *_ in steps]).reshape(8, 59):
        assert np.array_equal(np.sort(epoch), np.arange(59))


@pytest.mark.parametrize(("samples", "batch"), [(1, 4), (3, 16), (5, 8)])
def test_sets_smaller_than_a_batch_or_a_chunk_wrap(write_shards, samples, batch):
    index = write_shards("few", [samples]).index
    order = Order(samples, batch, SEED)
    whole = steps_of(index, order, 0, 12, micro_batch=batch)
    assert [ids.tolist() for ids, *_ in whole] == [order.ids(step).tolist() for step in range(12)]
    assert_same(steps_of(index, order, 0, 12, world=2, micro_batch=2), whole)


def test_lists_of_labels_are_padded(write_shards):
    shards = write_shards("lists", [20], labels=lambda u: list(range(u % 4)))
    for ids, _, labels, _ in steps_of(shards.index, Order(20, 4, SEED), 0, 5):
        assert labels.tolist() == [list(range(u % 4)) + [-1] * (3 - u % 4) for u in ids]


def test_the_stream_has_no_end_unless_one_is_given(shards):
    with train(shards.index, Order(203, 16, SEED)) as loader:
        taken = [next(loader).ids for _ in range(80)]
    order = Order(203, 16, SEED)
    assert np.array_equal(np.concatenate(taken), np.concatenate([order.ids(step) for step in range(20)]))


def test_a_batch_handed_out_is_never_written_again(shards):
    with train(shards.index, Order(203, 16, SEED), micro_batch=16, stop_step=20) as loader:
        batches, copies = [], []
        for batch in loader:
            batches.append(batch)
            copies.append(batch.images.clone())
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(batches, copies, strict=True))
    assert len({batch.images.data_ptr() for batch in batches}) == 20


def test_floats_are_the_same_images_to_the_last_bit(write_shards):
    index = write_shards("some", [40], replace={7: b"no image"}).index
    order = Order(40, 8, SEED)
    with train(index, order, stop_step=6) as plain, train(index, order, stop_step=6, floats=True) as floats:
        for batch, other in zip(plain, floats, strict=True):
            assert other.images.dtype == torch.float32
            assert torch.equal(other.images, to_float(batch.images, torch.float32))
            assert torch.equal(other.valid, batch.valid)


# Evaluation


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [7, 64, 500])
def test_an_evaluation_covers_every_sample_once_in_order(shards, world, batch):
    ranks = [list(evaluate(shards.index, batch=batch, rank=rank, world=world)) for rank in range(world)]
    assert len({len(of_rank) for of_rank in ranks}) == 1
    rows = [part for step in zip(*ranks, strict=True) for part in step]
    ids, valid = np.concatenate([part.ids for part in rows]), torch.cat([part.valid for part in rows]).numpy()
    labels = torch.cat([part.labels for part in rows])
    assert ids[valid].tolist() == list(range(203))
    assert valid.tolist() == [True] * 203 + [False] * (len(valid) - 203)
    assert labels[valid].tolist() == [[label] for label in shards.labels]
    assert [key for part in rows for key in part.keys] == [*shards.keys, *[None] * (len(valid) - 203)]
    assert (ids[~valid] == -1).all()
    assert (labels[~valid] == -1).all()
    assert (torch.cat([part.images for part in rows])[~valid] == 128).all()
    assert all(len(part.ids) == len(part.images) == len(part.labels) == batch for part in rows)
    last = rows[(203 - 1) // batch]
    row = (203 - 1) % batch
    assert torch.equal(last.images[row], EvalImages(16, 3)(decode(shards.images[202], 3), 0, 202))


def test_an_evaluation_of_chosen_ids_keeps_their_order(shards):
    ids = [200, 3, 4, 5, 3, 99, 0]
    batches = list(evaluate(shards.index, ids=ids))
    assert np.concatenate([batch.ids for batch in batches]).tolist() == [*ids, -1]
    images = torch.cat([batch.images for batch in batches])
    for row, sample_id in enumerate(ids):
        assert torch.equal(images[row], EvalImages(16, 3)(decode(shards.images[sample_id], 3), 0, sample_id))


def test_an_evaluation_of_nothing_is_empty(shards):
    assert list(evaluate(shards.index, ids=[])) == []


# Threads


def test_decoding_runs_ahead_by_a_few_micro_batches_and_no_further(shards):
    decoded = []

    class Counting(EvalImages):
        def __call__(self, image, epoch, sample_id):
            decoded.append(sample_id)
            return super().__call__(image, epoch, sample_id)

    with train(shards.index, Order(203, 16, SEED), micro_batch=16, transform=Counting(16, 3)) as loader:
        for taken in range(4):
            deadline = time.perf_counter() + 20
            while len(decoded) < 16 * (taken + 2) and time.perf_counter() < deadline:
                time.sleep(0.02)
            time.sleep(0.2)
            assert 16 * (taken + 2) <= len(decoded) <= 16 * (taken + 5)
            next(loader)


@pytest.mark.parametrize("consumed", [0, 1])
def test_closing_midway_is_prompt_and_leaves_no_thread(shards, consumed):
    seen = []

    class Slow(EvalImages):  # but for the images of the batches that are consumed
        def __call__(self, image, epoch, sample_id):
            seen.append(sample_id)
            time.sleep(0.4 if len(seen) > 64 * consumed else 0)
            return EvalImages(16, 3)(image, epoch, sample_id)

    # A thread takes eight images at a time: 3 s. What is queued takes twenty.
    loader = train(shards.index, Order(203, 192, SEED), micro_batch=64, workers=4, transform=Slow(16, 3))
    for _ in range(consumed):
        next(loader)
    time.sleep(0.05)
    assert stream_threads()
    begin = time.perf_counter()
    loader.close()
    assert time.perf_counter() - begin < 2
    assert not stream_threads()
    assert list(loader) == []
    loader.close()


def test_closed_by_another_thread_nothing_half_made_is_handed_over(shards, monkeypatch):
    waited_for = threading.Event()

    class Slow(EvalImages):
        def __call__(self, image, epoch, sample_id):
            time.sleep(0.1)
            return super().__call__(image, epoch, sample_id)

    monkeypatch.setattr("pretrain.stream.loader.wait", lambda stripes: (waited_for.set(), wait(stripes)))
    loader = train(shards.index, Order(203, 64, SEED), micro_batch=64, workers=1, transform=Slow(16, 3))
    with ThreadPoolExecutor(1) as threads:
        batch = threads.submit(next, loader)
        waited_for.wait()
        loader.close()
        with pytest.raises(RuntimeError, match="closed while a batch of it was waited for"):
            batch.result(timeout=20)


def test_threads_that_cannot_be_started_are_told_and_leave_none(shards, monkeypatch):
    def start(thread, real=threading.Thread.start):
        if thread.name.startswith("decode") and len(stream_threads()) == 2:
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            train(shards.index, Order(203, 16, SEED), workers=4)
    assert not stream_threads()


def test_what_fails_before_the_first_batch_leaves_no_thread(shards, monkeypatch):
    monkeypatch.setattr("pretrain.stream.reader.Reader.__next__", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(shards.index, Order(203, 16, SEED))
    assert not stream_threads()


def test_a_loader_forgotten_ends_its_threads(shards):
    loader = train(shards.index, Order(203, 16, SEED))
    next(loader)
    del loader
    gc.collect()
    deadline = time.perf_counter() + 5
    while stream_threads() and time.perf_counter() < deadline:
        time.sleep(0.02)
    assert not stream_threads()


def test_decode_threads_do_not_start_threads_of_torch_and_leave_the_callers_alone(shards):
    asked = set()

    class Asking(SquashImages):
        def __call__(self, image, epoch, sample_id):
            asked.add(torch.get_num_threads())
            return super().__call__(image, epoch, sample_id)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(train(shards.index, Order(203, 16, SEED), transform=Asking(16, 3), stop_step=4))
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert asked == {1}


def test_time_is_counted_by_part(shards):
    with train(shards.index, Order(203, 16, SEED), stop_step=12) as loader:
        list(loader)
    counters = loader.counters
    assert counters.images == 12 * 16
    assert counters.unreadable == 0
    assert counters.bytes_read > 0
    assert counters.read_seconds > 0
    for part in ("starved", "decode", "augment", "collate"):
        assert getattr(counters, f"{part}_seconds") > 0
    assert counters.seen()["images"] == 12 * 16


# Refusals


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"world": 3}, "a multiple of 3 ranks × the micro-batch"),
        ({"micro_batch": 3}, "train.micro_batch 3; a multiple of 1 ranks"),
        ({"micro_batch": 16, "world": 2}, "train.micro_batch 16; a multiple of 2 ranks"),
        ({"micro_batch": 0}, "train.micro_batch 0"),
        ({"rank": 1}, "rank 1 of 1"),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_starts(shards, change, named):
    with pytest.raises(InputError, match=named):
        train(shards.index, Order(203, 16, SEED), **change)


def test_an_order_for_another_index_is_refused(shards):
    with pytest.raises(InputError, match="for 204 samples, the index holds 203"):
        train(shards.index, Order(204, 16, SEED))


def test_an_evaluation_refuses_ids_outside_the_index(shards):
    with pytest.raises(InputError, match="sample 203 is not in the index, whose ids are 0 to 202"):
        evaluate(shards.index, ids=[0, 203])
