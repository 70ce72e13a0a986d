"""Frozen features, on one rank and on two."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fewshot.features import (
    IMAGES,
    LAYERS,
    Extraction,
    Layer,
    count_repeated,
    extract,
    find_layer,
    headline,
    nearest_layer,
    pixels,
    preprocessing,
    widths,
)
from pretrain.errors import InputError, StorageError
from pretrain.images.decode import decode
from pretrain.images.transforms import SquashImages, to_float
from pretrain.index.index import Index
from pretrain.ranks.collectives import World
from pretrain.storage.retry import Timeouts
from pretrain.storage.shardfile import ShardReader
from pretrain.stream.chunk import Chunk
from pretrain.stream.counters import Counters

NAMES = ["tanh", "pre_tanh", "cls", "mean"]


def run(model, path, ids, world, batch=16):
    layers = [LAYERS[name] for name in NAMES]
    return extract(model, layers, Index.open(path), ids, Extraction(model.spec, batch, 1, world))


def one_of_two(rank, meeting, model, path, ids, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found = run(model, path, ids, World(rank, 2, rank, torch.device("cpu")))
    assert (found is None) == (rank == 1)
    if found is not None:
        np.savez(out, **found)
    dist.destroy_process_group()


@pytest.fixture
def model(tiny, drawn):
    return drawn(tiny(representation_size=48))


@pytest.fixture
def ids():
    """53 of 150, ascending: neither a multiple of the batch nor of the ranks."""
    return np.sort(np.random.default_rng(0).choice(150, 53, replace=False))


def test_equal_images_are_known_in_whatever_shards_they_lie(model, digits, shards, alone):
    pixels, labels = (digits[0][:60].reshape(-1, 8, 8) * 15).astype(np.uint8), digits[1][:60]
    other = np.r_[7:12, 50:60]  # of another set: five of the first forty images, and ten that are not among them
    first, second = shards("first", pixels[:40], labels[:40]), shards("second", pixels[other], labels[other])
    support = run(model, first, np.arange(40), alone)[IMAGES]
    query = run(model, second, np.arange(15), alone)[IMAGES]
    assert count_repeated(query, support) == 5


def test_features_are_the_networks_image_by_image(model, digit_shards, ids, alone):
    found = run(model, digit_shards[1], ids, alone)
    index = Index.open(digit_shards[1])
    encoded = Chunk(ids)
    encoded.locate(index, ShardReader())
    encoded.read(Counters())
    squash = SquashImages(8, 1)
    for row, id in enumerate(ids.tolist()):
        with torch.no_grad():
            image = to_float(squash(decode(encoded.take(id)[1], 1), 0, id), torch.float32)
            expected = model.eval()(image[None], features=True)
        for layer in NAMES:
            assert found[layer][row] == pytest.approx(expected[layer][0].numpy(), abs=1e-6)


def test_two_ranks_give_the_features_of_one_to_the_last_bit(model, digit_shards, ids, alone, tmp_path, spread):
    out = tmp_path / "two.npz"
    spread(one_of_two, str(tmp_path / "meeting"), model, digit_shards[1], ids, str(out))
    single = run(model, digit_shards[1], ids, alone)
    with np.load(out) as both:
        for layer in NAMES:
            assert both[layer].shape == single[layer].shape == (53, single[layer].shape[1])
            assert np.array_equal(both[layer], single[layer])


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_batch_changes_no_more_than_the_last_digits(model, digit_shards, ids, alone, batch):
    first, second = (run(model, digit_shards[1], ids, alone, batch=size) for size in (16, batch))
    for layer in NAMES:
        assert np.abs(first[layer] - second[layer]).max() < 1e-5


def test_the_network_is_evaluated_and_left_as_it_was(tiny, drawn, digit_shards, ids, alone):
    model = drawn(tiny(representation_size=48, dropout=0.5)).train()
    first, second = (run(model, digit_shards[1], ids, alone) for _ in range(2))
    assert all(np.array_equal(first[layer], second[layer]) for layer in NAMES)
    assert model.training
    run(model.eval(), digit_shards[1], ids, alone)
    assert not model.training


def test_an_unreadable_image_is_named_or_seen_as_grey_and_told(model, shards, damage, alone):
    path = shards("damaged", np.full((4, 8, 8), 255, np.uint8), np.arange(4) % 2)
    damage(path, 2)
    index, unreadable = Index.open(path), []
    how = Extraction(model.spec, 2, 1, alone)
    with pytest.raises(InputError, match=r"byte \d+: sample 2 \(.*\): png"):
        extract(model, [LAYERS["cls"]], index, np.arange(4), how)
    found = extract(model, [LAYERS["cls"]], index, np.arange(4), how, unreadable=unreadable)["cls"]
    assert [fault.sample_id for fault in unreadable] == [2]
    assert np.array_equal(found[0], found[1])
    assert not np.allclose(found[2], found[1])


@pytest.mark.parametrize("unreadable", [None, []])
def test_a_chunk_that_cannot_be_read_is_refused_and_may_be_read_later_where_storage_is_at_fault(
    model, digit_shards, remote, ids, alone, unreadable
):
    server, path = remote(digit_shards[1])
    timeouts = Timeouts(deadline=0.5, first_backoff=0.01, most_backoff=0.05)
    how = Extraction(model.spec, 16, 1, alone, timeouts)

    def some():
        extract(model, [LAYERS["cls"]], Index.open(path), ids, how, doing="some", unreadable=unreadable)

    server.usual = 503
    with pytest.raises(StorageError, match=r"^some: .*503 Service Unavailable; given up after .* s$"):
        some()
    server.usual = 404
    with pytest.raises(InputError, match=r"^some: .*404 Not Found; mend it or leave it out$") as caught:
        some()
    assert not isinstance(caught.value, StorageError)
    assert not unreadable


def test_preprocessing_is_told_with_the_sizes_of_the_protocol():
    assert preprocessing(224).startswith("squash to 256x256 (bilinear, half-pixel centres, no antialias")
    assert "centre crop 224x224, to [-1, 1]" in preprocessing(224)


def switches():
    """Whether and how products of fp32 may be computed in less, as far as torch tells."""
    backends = torch.backends
    found = [torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        parts = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
        found += [part.fp32_precision for part in parts]
    return found


def test_features_called_float32_are_computed_in_float32(digit_shards, tiny, drawn, alone):
    model, seen = drawn(tiny(representation_size=8)), []
    model.register_forward_hook(lambda *_: seen.append(switches()))
    at_first = switches()
    assert torch.backends.cudnn.allow_tf32, "torch's default"
    try:
        for precision in ("high", "medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            before = switches()
            run(model, digit_shards[1], np.arange(4), alone)
            assert seen[0][:3] == ["highest", False, False]
            assert set(seen.pop()[3:]) <= {"ieee"}
            assert switches() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert switches()[:3] == at_first[:3]


ALL = tuple(LAYERS)


def test_any_number_of_threads_gives_the_features_of_one_to_the_last_bit(tiny, drawn, digit_shards, ids, alone):
    """Width 24 and this depth: products that torch shares among threads otherwise, with other last digits."""
    model, before = drawn(tiny(patch_size=4, layers=4, width=24, mlp=24, heads=3)), torch.get_num_threads()
    layers, how, found = [LAYERS["cls"], find_layer("block2_mean")], Extraction(model.spec, 32, 1, alone), {}
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found[count] = extract(model, layers, Index.open(digit_shards[1]), ids, how)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for count in (2, 3, 8):
        for name in ("cls", "block2_mean", IMAGES):
            assert np.array_equal(found[count][name], found[1][name])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_blocks_features_are_the_residual_stream_after_it_counted_from_either_end(
    tiny, drawn, digit_shards, alone, pool
):
    model, index = drawn(tiny(layers=3, pool=pool)), Index.open(digit_shards[1])
    names = ["block1_cls", "block1_mean", "block-3_mean", "block3_cls", "block-1_cls"]
    assert widths(model.spec, names) == dict.fromkeys(names, 32)

    def extracted(layers):
        return extract(model, layers, index, np.arange(5), Extraction(model.spec, 4, 1, alone))

    found = extracted([find_layer(name) for name in names])
    assert np.array_equal(found["block1_mean"], found["block-3_mean"])
    assert np.array_equal(found["block3_cls"], found["block-1_cls"])
    model.norm = torch.nn.Identity()  # of what stands after the last block, "cls" is then the residual stream
    plain = [LAYERS["cls"], LAYERS["mean"]]
    assert np.array_equal(found["block3_cls"], extracted(plain)["cls"])
    model.blocks = model.blocks[:1]
    first = extracted(plain)
    assert np.array_equal(found["block1_cls"], first["cls"])
    assert np.array_equal(found["block1_mean"], first["mean"])
    assert np.array_equal(first["cls"], first["mean"]) == (pool == "mean")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("block0_cls", "block1_cls"), ("block06_cls", "block6_cls"), ("blocks6_mean", "block6_mean"),
        ("Block-2_CLS", "block-2_cls"), ("block_6_max", "block6_mean"), ("pretanh", "pre_tanh"), ("weight", None),
    ],
)  # fmt: skip
def test_a_name_that_is_no_layers_is_near_to_one_that_is(name, meant):
    assert (find_layer(name), nearest_layer(name)) == (None, meant)


def test_widths_are_those_of_the_features_that_the_network_has(tiny, drawn, digit_shards, alone):
    for size, present in ((48, ALL), (None, tuple(n for n in ALL if n not in ("tanh", "pre_tanh")))):
        model = drawn(tiny(representation_size=size))
        found = widths(model.spec, ALL)
        assert tuple(found) == present
        layers, index = [LAYERS[name] for name in present], Index.open(digit_shards[1])
        features = extract(model, layers, index, np.arange(3), Extraction(model.spec, 4, 1, alone))
        assert {name: features[name].shape[1] for name in present} == found


def test_a_layer_may_read_any_submodule_that_the_network_has(tiny, drawn, digit_shards, alone, monkeypatch):
    def first_block(outputs):
        return outputs["blocks.0"][:, 0]

    model, index = drawn(tiny()), Index.open(digit_shards[1])
    early = Layer("early", "class token after the first block", first_block, taps=("blocks.0",))
    same = Layer("same", "of two blocks", lambda outputs: outputs["blocks.-2"][:, 0], taps=("blocks.-2",))
    both = extract(model, [early, same], index, np.arange(3), Extraction(model.spec, 4, 1, alone))
    found = both["early"]
    assert np.array_equal(both["same"], found)
    model.blocks = model.blocks[:1]
    model.norm = torch.nn.Identity()
    last = extract(model, [LAYERS["cls"]], index, np.arange(3), Extraction(model.spec, 4, 1, alone))["cls"]
    assert np.array_equal(found, last)
    late = Layer("late", "class token after the third block", first_block, taps=("blocks.2",))
    for layer in (early, late):
        monkeypatch.setitem(LAYERS, layer.name, layer)
    assert widths(tiny(), ("late", "early")) == {"early": 32}


@pytest.mark.parametrize(
    ("features", "leading"),
    [(ALL, "tanh"), (("mean", "cls", "pixels"), "mean"), (("pixels", "cls", "tanh"), "cls"), (("untrained",), None)],
)
def test_the_first_feature_that_is_no_baseline_leads(features, leading):
    assert headline(features) == leading


def test_small_images_are_their_own_features():
    images = torch.arange(2 * 3 * 28 * 28.0).reshape(2, 3, 28, 28)
    assert torch.equal(pixels(images), images.reshape(2, -1))


def test_large_images_are_averaged_down():
    images = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 224, 224)))
    expected = images.reshape(2, 3, 32, 7, 32, 7).mean(dim=(3, 5)).reshape(2, -1)
    assert torch.allclose(pixels(images), expected, rtol=0, atol=1e-12)
