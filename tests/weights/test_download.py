"""Weights at a URL: copied once, a copy for each version, refused with the file's own messages."""

import sys

import pytest
import torch

from launch import export as command
from pretrain.errors import InputError
from pretrain.storage.store import Stat
from pretrain.weights import download
from pretrain.weights.download import Remote
from pretrain.weights.export import export
from pretrain.weights.load import choose, load_weights
from pretrain.weights.networks import open_networks
from pretrain.weights.read import FORMATS


@pytest.fixture
def place(tmp_path, monkeypatch, run_folder, network):
    """A folder to be served that holds an export; copies go to tmp_path/cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pretrain.weights.download._PART", 1000)
    folder = tmp_path / "served"
    folder.mkdir()
    export(choose(run_folder(tmp_path / "run", network(0))), FORMATS["safetensors"], folder / "vit.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_weights_at_a_url_are_copied_once(kind, place, serve, network, tmp_path, capsys):
    server = serve(place)
    url = f"{getattr(server, kind)}/vit.safetensors"
    (opened,) = open_networks([url], None)
    assert opened.id == "vit.safetensors"
    assert opened.source.name == url
    assert torch.equal(opened.source.read().tensors["head.weight"], network(0).head.weight)
    assert "copied to" in capsys.readouterr().out
    assert torch.equal(load_weights(url).tensors["head.weight"], network(0).head.weight)
    assert "copied to" not in capsys.readouterr().out


def test_another_version_is_another_copy(place, serve, run_folder, network, tmp_path):
    server = serve(place)
    url = f"{server.http}/vit.safetensors"
    first = Remote.find(url).local
    load_weights(url)
    (place / "vit.safetensors").unlink()
    export(choose(run_folder(tmp_path / "other", network(1))), FORMATS["safetensors"], place / "vit.safetensors")
    assert Remote.find(url).local != first
    assert torch.equal(load_weights(url).tensors["head.weight"], network(1).head.weight)


def test_without_word_of_its_version_a_file_is_copied_each_time(place, serve, network, monkeypatch):
    url = f"{serve(place).http}/vit.safetensors"
    content = (place / "vit.safetensors").read_bytes()
    monkeypatch.setattr(download, "stat", lambda url: Stat(len(content), ""))
    monkeypatch.setattr(download, "read_range", lambda extent, *_, **__: content[extent.begin : extent.end])
    assert torch.equal(load_weights(url).tensors["head.weight"], network(0).head.weight)
    content = bytes(len(content))
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_weights(url)


def test_weights_at_a_url_are_exported(place, serve, tmp_path, monkeypatch):
    out = tmp_path / "vit.safetensors"
    words = [f"{serve(place).http}/vit.safetensors", "--format", "timm", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    assert command.main() == 0
    assert load_weights(out).step == 3


def test_what_is_not_there_is_refused(place, serve):
    server = serve(place)
    for name in ("other.safetensors", "folder"):
        with pytest.raises(InputError, match=name):
            load_weights(f"{server.http}/{name}")


@pytest.mark.parametrize("index", ["no JSON", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_at_a_url_is_refused(index, place, serve):
    (place / "config.json").write_text("{}")
    (place / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="no weight_map of tensor names to files"):
        load_weights(serve(place).http)


def test_a_copy_that_breaks_off_leaves_nothing_that_counts(place, serve, tmp_path, monkeypatch):
    server = serve(place)
    url = f"{server.http}/vit.safetensors"
    whole, count = download.read_range, 0

    def broken(*given, **options):
        nonlocal count
        count += 1
        if count > 3:
            raise InputError("the line is cut")
        return whole(*given, **options)

    monkeypatch.setattr(download, "read_range", broken)
    with pytest.raises(InputError, match="the line is cut"):
        load_weights(url)
    assert not Remote.find(url).local.exists()
    monkeypatch.setattr(download, "read_range", whole)
    assert load_weights(url).step == 3
