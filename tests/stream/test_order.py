"""The order function: exact epochs, chunks kept whole, and one integer as the place in it."""

import json
import time
from itertools import pairwise

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.hashing import hash_words, mix64, stream64
from pretrain.stream.order import ORDER_VERSION, Order

SHAPES = [
    # samples, chunk, lanes, global batch
    (1, 8, None, 4),
    (2, 1, 1, 2),
    (5, 8, None, 3),
    (7, 8, 4096, 16),
    (17, 1, 3, 5),
    (64, 8, 8, 8),
    (65, 8, 64, 8),
    (100, 8, 4096, 4096),
    (203, 8, None, 16),
    (1000, 3, 7, 10),
    (1797, 8, None, 32),
    (4096, 16, 64, 64),
    (20_011, 16, 4096, 256),
    (20_011, 8, None, 64),
]


@pytest.mark.parametrize(("samples", "chunk", "lanes", "batch"), SHAPES)
def test_every_epoch_holds_every_sample_once(samples, chunk, lanes, batch):
    order = Order(samples, batch, seed=3, chunk=chunk, lanes=lanes)
    for epoch in (0, 1, 2, 1000):
        ids = order.at(np.arange(epoch * samples, (epoch + 1) * samples))
        assert np.array_equal(np.sort(ids), np.arange(samples))


def test_every_epoch_holds_every_sample_once_for_many_shapes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        samples, chunk, lanes = (int(2 ** rng.uniform(0, top)) for top in (11, 4.5, 12.5))
        order = Order(samples, int(rng.integers(1, 40)), int(rng.integers(1 << 40)), chunk, lanes)
        epoch = int(rng.integers(100))
        ids = order.at(np.arange(epoch * samples, (epoch + 1) * samples))
        assert np.array_equal(np.sort(ids), np.arange(samples)), order


@pytest.mark.parametrize(("samples", "chunk", "lanes", "batch"), SHAPES)
def test_a_lane_takes_its_chunks_whole_and_one_after_the_other(samples, chunk, lanes, batch):
    order = Order(samples, batch, seed=5, chunk=chunk, lanes=lanes)
    count = order.lane_count
    per_lane = samples // chunk // count * chunk
    head = order.at(np.arange(count * per_lane) + 2 * samples).reshape(per_lane, count)
    chunks = (head // chunk).T.reshape(count, -1, chunk)  # lane, turn, sample of the turn
    assert (chunks == chunks[:, :, :1]).all()
    assert len(np.unique(chunks[:, :, 0])) == chunks[:, :, 0].size


@pytest.mark.parametrize(("samples", "chunk", "lanes", "batch"), SHAPES)
def test_siblings_are_the_positions_of_a_whole_chunk(samples, chunk, lanes, batch):
    order = Order(samples, batch, seed=5, chunk=chunk, lanes=lanes)
    positions = np.arange(samples, 2 * samples)
    chunk_of = order.at(positions) // chunk
    for row in np.random.default_rng(0).permutation(samples)[:300]:
        siblings = order.siblings(positions[row : row + 1])[0]
        assert np.array_equal(siblings[siblings >= 0], positions[chunk_of == chunk_of[row]])


def hashed(*words):
    return int(hash_words(*words)[0])


def by_the_formula(order, position):
    """The definition of the order, one position at a time and in whole numbers."""
    N, g, V = order.samples, order.chunk, order.lane_count
    M = N // g
    epoch, p = divmod(position, N)
    head, rest = V * (M // V * g), M % V
    if p < head:
        y = p % V * (M // V * g) + p // V
    elif p < M * g:
        y = head + (p - head) % rest * g + (p - head) // rest
    else:
        return p
    bits = (M - 1).bit_length()
    low_bits, high_bits = (bits + 1) // 2, bits // 2
    chunk = y // g
    while True:
        low, high = chunk % 2**low_bits, chunk >> low_bits
        for number in range(8):
            key = hashed(1, order.seed, epoch, number)
            if number % 2:
                low ^= int(mix64(np.array([high ^ key], np.uint64))[0]) % 2**low_bits
            else:
                high ^= int(mix64(np.array([low ^ key], np.uint64))[0]) % 2**high_bits
        chunk = high << low_bits | low
        if chunk < M:
            break
    key = hash_words(2, order.seed, epoch, chunk)
    hashes = stream64(key, np.arange(g, dtype=np.uint64)).tolist()
    ranks = sorted(range(g), key=lambda number: hashes[number])  # stable
    return chunk * g + ranks.index(y % g)


@pytest.mark.parametrize(("samples", "chunk", "lanes", "batch"), SHAPES)
def test_the_order_is_its_definition(samples, chunk, lanes, batch):
    order = Order(samples, batch, seed=11, chunk=chunk, lanes=lanes)
    positions = np.unique(np.random.default_rng(0).integers(0, 3 * samples, 60))
    assert order.at(positions).tolist() == [by_the_formula(order, int(x)) for x in positions]


def test_slices_of_a_step_are_parts_of_the_whole():
    order = Order(203, 48, seed=1)
    for step in (0, 3, 4, 5, 1000):
        whole = order.ids(step)
        assert len(whole) == 48
        assert np.array_equal(whole, order.at(np.arange(step * 48, (step + 1) * 48)))
        for parts in (2, 3, 16, 48):
            bounds = np.linspace(0, 48, parts + 1).astype(int)
            pieces = [order.ids(step, a, b) for a, b in pairwise(bounds)]
            assert np.array_equal(np.concatenate(pieces), whole)
    assert order.ids(3, 5, 5).shape == (0,)


def test_a_step_may_span_several_epochs():
    order = Order(5, 17, seed=2, chunk=2)
    ids, epochs = order.ids(1), order.epochs(1)
    assert epochs.tolist() == [3] * 3 + [4] * 5 + [5] * 5 + [6] * 4
    for epoch in (4, 5):
        assert sorted(ids[epochs == epoch].tolist()) == [0, 1, 2, 3, 4]


def test_epochs_and_seeds_differ():
    order, other = Order(1000, 10, seed=1), Order(1000, 10, seed=2)
    runs = [order.at(np.arange(1000) + 1000 * epoch) for epoch in range(3)] + [other.at(np.arange(1000))]
    for a in range(4):
        for b in range(a):
            assert (runs[a] == runs[b]).mean() < 0.02


@pytest.mark.parametrize("chunks", [2, 3, 5, 16, 17, 64])
def test_every_chunk_comes_first_equally_often(chunks):
    epochs = 400 * chunks
    order = Order(chunks, 1, seed=9, chunk=1, lanes=1)
    for place in {0, 1, chunks - 1}:
        counts = np.bincount(order.at(np.arange(epochs) * chunks + place), minlength=chunks)
        # chi-square per degree of freedom: mean 1, deviation sqrt(2 / (chunks - 1))
        assert ((counts - 400) ** 2 / 400).sum() / (chunks - 1) < 1 + 5 * np.sqrt(2 / (chunks - 1))


def test_every_order_within_a_chunk_is_equally_likely():
    order = Order(3, 1, seed=4, chunk=3, lanes=1)
    ids = order.at(np.arange(18_000)).reshape(6000, 3)
    counts = np.unique(ids @ [9, 3, 1], return_counts=True)[1]
    assert len(counts) == 6
    assert counts == pytest.approx(1000, rel=0.15)


def test_batches_of_class_sorted_data_are_mixed():
    # 100 classes in order: a batch should hold what independent draws would, chi-square per class near 1.
    order = Order(100_000, 250, seed=0)
    counts = np.stack([np.bincount(order.ids(step) // 1000, minlength=100) for step in range(0, 400, 7)])
    assert ((counts - 2.5) ** 2 / 2.5).mean() == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize(
    ("samples", "batch", "chunk", "lanes"),
    [(300_000_000, 4096, 8, 16384), (1_281_167, 4096, 8, 4096), (6_000_000, 4096, 8, 8192), (5, 16, 8, 16)],
)
def test_the_default_lanes_follow_the_size_of_an_epoch(samples, batch, chunk, lanes):
    order = Order(samples, batch, seed=0, chunk=chunk)
    assert order.lanes == order.lane_count == lanes == batch * min(max(samples // (64 * chunk * batch), 1), 4)


def test_the_order_never_changes():
    assert ORDER_VERSION == 1
    assert Order(203, 8, seed=7).ids(0).tolist() == [80, 52, 151, 105, 70, 36, 78, 116]
    assert Order(203, 8, seed=7).ids(25).tolist() == [200, 201, 202, 194, 136, 78, 90, 61]
    assert Order(300_000_000, 4096, seed=42).ids(100_000, 0, 6).tolist() == [
        224380909,
        118688605,
        154684843,
        176504784,
        190901056,
        204905584,
    ]
    assert Order(1_281_167, 1024, seed=2**52, chunk=5, lanes=100).ids(1251, 140, 146).tolist() == [
        806041,
        1281165,
        1281166,
        250987,
        415841,
        291715,
    ]
    assert Order(10, 12, seed=0, chunk=1).ids(3).tolist() == [2, 7, 9, 0, 6, 9, 4, 8, 0, 2, 3, 1]


def test_the_order_is_fast_where_a_table_would_not_fit():
    order = Order(300_000_000, 4096, seed=1)
    seconds = []
    for step in range(20):
        begin = time.perf_counter()
        order.ids(step * 9973)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.010


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"global_batch": 0}, "global_batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"lanes": 0}, "lanes is 0"),
        ({"samples": 2.0}, "samples is 2.0"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_impossible_orders_are_refused_by_name(change, named):
    with pytest.raises(InputError, match=named):
        Order(**{"samples": 10, "global_batch": 2, "seed": 0, **change})


@pytest.mark.parametrize(("step", "begin", "end"), [(-1, 0, 4), (0, -1, 4), (0, 0, 17), (0, 5, 4)])
def test_slots_outside_the_batch_are_refused(step, begin, end):
    with pytest.raises(InputError, match=r"slots lie in \[0, 16\)"):
        Order(100, 16, seed=0).ids(step, begin, end)


def test_steps_beyond_what_positions_count_are_refused():
    order = Order(600, 24, 0)
    last = (1 << 62) // 24 - 1
    assert sorted(order.epochs(last)) == list(order.epochs(last))
    with pytest.raises(InputError, match=f"step {last + 1} of batches of 24; positions up to 2\\^62"):
        order.ids(last + 1)


def test_the_state_is_small_and_leads_back_to_the_step():
    order = Order(300_000_000, 4096, seed=1)
    text = json.dumps(order.state("ab" * 32, 2_000_000))
    assert len(text) < 1000
    assert order.check(json.loads(text), "ab" * 32) == 2_000_000
    assert json.loads(text)["position"] == 2_000_000 * 4096


@pytest.mark.parametrize(
    ("change", "index_hash", "named"),
    [
        ({"samples": 1001}, "a", "samples was 1000, is 1001"),
        ({"global_batch": 20}, "a", "global_batch was 10, is 20"),
        ({"lanes": 30}, "a", "lanes was 10, is 30"),
        ({"chunk": 4, "lanes": 10}, "a", "chunk was 8, is 4"),
        ({"seed": 2}, "a", "seed was 1, is 2"),
        ({}, "b", "index_hash was 'a', is 'b'"),
    ],
)
def test_resuming_another_order_is_refused_with_the_difference(change, index_hash, named):
    base = {"samples": 1000, "global_batch": 10, "seed": 1}
    state = Order(**base).state("a", 5)
    with pytest.raises(InputError, match=named):
        Order(**{**base, **change}).check(state, index_hash)


def test_a_run_whose_index_knew_no_content_goes_on_with_one_that_does_but_not_the_reverse():
    order, keys, content = Order(1000, 10, seed=1), "sequence", "content"
    assert order.check(order.state(keys, 5), content, keys) == 5
    assert order.check(order.state(content, 5), content, keys) == 5
    with pytest.raises(InputError, match=r"index_hash was 'content', is 'other'\. Resume with the data"):
        order.check(order.state(content, 5), "other", keys)
    with pytest.raises(InputError, match=r"is 'sequence' \(this index does not hold all shards' sha256: index them"):
        order.check(order.state(content, 5), keys, keys)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"order_version": 0}, "order_version was 0"), ({"position": 51}, "51"), ({"position": "50"}, "'50'")],
)
def test_a_state_that_cannot_be_ours_is_refused(change, named):
    order = Order(1000, 10, seed=1)
    with pytest.raises(InputError, match=named):
        order.check({**order.state("a", 5), **change}, "a")
    with pytest.raises(InputError, match="no lanes"):
        order.check({name: value for name, value in order.state("a", 5).items() if name != "lanes"}, "a")
