"""Kept features, and the files they are in."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fewshot.cache import FeatureCache, content, feature_file, is_current, read_feature, write_features, write_times
from fewshot.config import DataSection, FewshotConfig, ProtocolSection
from fewshot.features import LAYERS, Extraction, extract
from fewshot.task import open_task
from pretrain.errors import InputError, StorageError
from pretrain.index.index import Index
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer
from pretrain.shards.scan import index_shards
from pretrain.weights import load
from pretrain.weights.networks import open_networks

NAN = np.full((3, 4), np.nan, np.float32)


def test_kept_features_come_back_by_id(tmp_path):
    path = tmp_path / "kept.npz"
    support = np.arange(6, dtype=np.float32).reshape(3, 2)
    write_features(path, {"support_ids": np.array([2, 5, 9]), "support_cls": support, "query_cls": -support})
    found = read_feature(path, "cls", "weights W")
    assert found.rows(np.array([9, 2])).tolist() == [[4, 5], [0, 1]]
    assert found.query.tolist() == (-support).tolist()


def test_features_that_are_not_finite_name_weights_and_layer(tmp_path):
    path = tmp_path / "kept.npz"
    write_features(path, {"support_ids": np.arange(3), "support_cls": NAN, "query_cls": NAN})
    with pytest.raises(InputError, match="weights W: cls is not finite for 3 of 3 support images"):
        read_feature(path, "cls", "weights W")


def test_a_damaged_feature_file_names_itself_and_the_mend(tmp_path):
    path = tmp_path / "kept.npz"
    path.write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(InputError, match=r"kept\.npz: cannot be read.*remove the file"):
        read_feature(path, "cls", "weights W")


def test_the_file_of_features_changes_with_all_that_fixes_them(tmp_path):
    first = {"weights": "a", "images": {"support": "b"}}
    assert feature_file(tmp_path, first) == feature_file(tmp_path, dict(reversed(first.items())))
    assert feature_file(tmp_path, first) != feature_file(tmp_path, {**first, "images": {"support": "c"}})


def test_shards_without_an_etag_are_told_apart_by_their_server_or_their_time(digit_shards, serve, tmp_path):
    shards = [Path(url) for url in Index.open(digit_shards[1]).shards.urls()]
    for shard in shards:
        shutil.copy(shard, tmp_path)
    server = serve(tmp_path)
    local = Index.open(index_shards([tmp_path], workers=1))
    remote = Index.open(index_shards([tmp_path], tmp_path / "far.vfi", base=f"{server.http}/", workers=1))
    there, features = content(remote), tmp_path / "features.npz"
    assert not is_current(features, {"query": write_times(local)})
    write_features(features, {"query_times": write_times(local), "query_cls": np.zeros(3)})
    assert is_current(features, {"query": write_times(local)})
    assert content(remote) == there
    assert not write_times(remote).any()
    changed = tmp_path / shards[0].name
    data = bytearray(changed.read_bytes())
    data[-1500] ^= 1
    changed.write_bytes(data)
    assert not is_current(features, {"query": write_times(local)})
    assert content(remote) != there
    changed.unlink()
    assert is_current(features, {"query": write_times(local)}), "of a shard that is gone nothing else is known"
    with pytest.raises(InputError, match=f"{changed.name}: 404 Not Found"):
        content(remote)
    features.write_bytes(features.read_bytes()[:100])
    assert is_current(features, {"query": write_times(local)}), "told when it is read"


def test_other_pixels_under_the_same_keys_are_other_content(shards):
    labels = np.arange(20) % 2
    black, grey = (Index.open(shards("same", np.full((20, 8, 8), tone, np.uint8), labels)) for tone in (0, 90))
    assert black.sequence == grey.sequence
    assert content(black) != content(grey)
    ids = np.arange(5)
    assert content(black, ids) not in (content(black), content(black, ids + 1))


@pytest.fixture
def setting(digit_shards, alone, tmp_path):
    """setting(features, support=…, query=…, seed=0, **data) -> the cache of a task of one draw, and the task."""

    def make(features=("cls",), support=digit_shards[0], query=digit_shards[1], seed=0, **data):
        protocol = ProtocolSection(shots=(1,), seeds=(0,), features=features)
        data = DataSection(support=support, query=query, workers=1, **data)
        config = FewshotConfig(name="one", seed=seed, data=data, fewshot=protocol)
        task = open_task(support, query, protocol)
        return FeatureCache(config, task.splits, tmp_path / "features", alone), task

    return make


@pytest.fixture
def network(tmp_path, tiny, drawn, run_folder):
    """network(image_size=None, dtype=…, **fields): that of a checkpoint."""

    def make(image_size=None, dtype=torch.float32, **fields):
        path = run_folder(tmp_path / "run", drawn(tiny(**fields)))
        (found,) = open_networks([path], image_size, dtype=dtype)
        return found

    return make


def rows(features, name):
    return read_feature(features.files[name], name, "w").query


def test_the_layers_of_a_network_share_a_file_and_each_network_has_its_own(setting, network):
    cache, _ = setting(tuple(LAYERS))
    found = cache.features(network(representation_size=48))
    assert list(found.files) == ["tanh", "pre_tanh", "cls", "mean", "untrained", "pixels"]
    assert len(set(found.files.values())) == 3
    assert {name: rows(found, name).shape[1] for name in found.files} == found.widths
    assert list(cache.features(network()).files) == ["cls", "mean", "untrained", "pixels"]


def test_nothing_left_to_probe_is_refused(setting, network):
    cache, _ = setting(("tanh", "pre_tanh"))
    with pytest.raises(InputError, match=r"fewshot\.features: tanh pre_tanh.*no representation head"):
        cache.features(network())
    with pytest.raises(InputError, match=r"fewshot\.features: tanh pre_tanh.*no representation head"):
        cache.check([network(representation_size=48), network()])


def test_a_block_beyond_the_networks_depth_is_refused_with_the_network_and_its_depth(setting, network):
    for name in ("block3_cls", "block-3_mean"):
        cache, _ = setting(("cls", name))
        with pytest.raises(
            InputError, match=rf"{name}: the network of .*step_00000003 has 2 blocks; block1 to block2, or"
        ):
            cache.check([network()])
    cache, _ = setting(("block-2_cls", "block2_mean"))
    assert cache.features(network()).widths == {"block-2_cls": 32, "block2_mean": 32}


def test_features_are_of_the_checkpoint_and_of_a_fresh_network(setting, network, tiny, drawn):
    cache, task = setting(("cls", "untrained"), seed=7)
    found, fresh = cache.features(network()), VisionTransformer(tiny())
    initialize(fresh, 7)
    given = {"cls": drawn(tiny()), "untrained": fresh}
    for name, model in given.items():
        how = Extraction(model.spec, 64, 1, cache._world)
        computed = extract(model, [LAYERS["cls"]], task.query, task.query_ids, how)["cls"]
        assert np.array_equal(rows(found, name), computed)


def test_a_file_is_of_its_weights_its_seed_and_its_arithmetic(setting, network):
    names = ("cls", "untrained", "pixels")
    first = setting(names)[0].features(network()).files
    for changed, same in (
        (setting(names)[0].features(network(gelu="tanh")).files, {"pixels"}),
        (setting(names, seed=1)[0].features(network()).files, {"cls", "pixels"}),
        (setting(names)[0].features(network(dtype=torch.bfloat16)).files, {"pixels"}),
        (setting(names)[0].features(network(image_size=10)).files, set()),
    ):
        assert {name for name in names if changed[name] == first[name]} == same


def test_a_layer_that_is_edited_is_computed_anew(setting, network, monkeypatch):
    """Under the same name, features of another computation would be scored with status 0."""
    first = setting(("cls",))[0].features(network()).files["cls"]
    assert setting(("cls",))[0].features(network()).files["cls"] == first
    monkeypatch.setattr("fewshot.cache._CODE", "of the edited table")
    edited = setting(("cls",))[0].features(network()).files["cls"]
    assert edited != first
    assert edited.is_file()


def test_features_of_another_torch_are_computed_anew(setting, network, monkeypatch):
    """The report tells the version that is there: features of another would be given out as its own."""
    first = setting(("cls",))[0].features(network()).files["cls"]
    monkeypatch.setattr("fewshot.cache.version", lambda name: "0.0")
    assert setting(("cls",))[0].features(network()).files["cls"] != first


def test_each_network_is_read_and_hashed_once(setting, network, monkeypatch):
    read, hashed = [], []
    for name, calls in (("read_tensors", read), ("fingerprint", hashed)):
        original = getattr(load, name)
        monkeypatch.setattr(
            load, name, lambda *a, original=original, calls=calls, **k: calls.append(1) or original(*a, **k)
        )
    one = network(representation_size=48)
    cache, _ = setting(tuple(LAYERS))
    cache.features(one)
    assert (len(read), len(hashed)) == (1, 1)
    cache.features(one)  # from the files
    assert (len(read), len(hashed)) == (2, 2)


@pytest.mark.parametrize("answered", [0, 2], ids=["shards are asked for", "samples are read"])
def test_storage_that_does_not_answer_is_waited_for_as_the_config_says(
    answered, setting, remote, digit_shards, network
):
    server, query = remote(digit_shards[1])  # of two shards
    far = {"features": ("pixels",), "query": query, "patience_minutes": 0.01}
    server.usual, server.good = 503, answered
    with pytest.raises(StorageError, match=r"503 Service Unavailable; given up after .* in 0\.\d s") as caught:
        setting(**far)[0].features(network())
    assert str(caught.value).startswith("features of data.query: ") == bool(answered)
    server.usual = None
    assert setting(**far)[0].features(network()).files["pixels"].is_file()


def test_features_are_kept_though_nobody_reads_the_console(setting, network, monkeypatch):
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    assert setting()[0].features(network()).files["cls"].is_file()
    with pytest.raises(OSError, match="No space left"):
        full.close()
