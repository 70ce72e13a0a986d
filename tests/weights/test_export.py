"""Exports: what a format cannot hold is refused, a file says what it is and what to expect of it, and it is checked."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch import export as command
from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages
from pretrain.weights import selftest
from pretrain.weights.export import check, export
from pretrain.weights.load import choose, load_weights
from pretrain.weights.networks import open_networks
from pretrain.weights.read import FORMATS


@pytest.fixture
def exported(run_folder, tmp_path, network):
    """exported(format, drop=(), **changes): an export of a small network, and the network."""

    def make(name, drop=(), **changes):
        model = network(**changes)
        source = choose(run_folder(tmp_path / "run", model))
        out = tmp_path / f"vit{FORMATS[name].suffix}"
        export(source, FORMATS[name], out, drop=drop)
        return out, model

    return make


def test_the_command_offers_the_formats_that_are_written():
    assert set(command.FORMATS) == {name for name, form in FORMATS.items() if form.example}


def test_what_comes_back_is_what_went_out(exported, tmp_path):
    out, model = exported("safetensors", representation_size=8, pool="mean", positions="sincos2d", gelu="tanh")
    read = load_weights(out)
    assert read.spec == model.spec
    assert (read.step, read.averaged) == (3, False)
    assert all(torch.equal(value, read.tensors[name]) for name, value in model.state_dict().items())
    again = tmp_path / "again.safetensors"
    export(choose(out), FORMATS["safetensors"], again)
    one, other = load_file(out), load_file(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_average_is_another_file(run_folder, tmp_path, network):
    run = run_folder(tmp_path / "run", network(0), average=network(1))
    export(choose(run), FORMATS["safetensors"], tmp_path / "mean.safetensors", averaged=True)
    read = load_weights(tmp_path / "mean.safetensors")
    assert read.averaged
    assert torch.equal(read.tensors["head.weight"], network(1).head.weight)
    (opened,) = open_networks([tmp_path / "mean.safetensors"], None)
    assert (opened.id, opened.averaged) == ("mean.safetensors averaged", True)
    with pytest.raises(InputError, match=r"mean.safetensors holds averaged weights alone"):
        open_networks([tmp_path / "mean.safetensors"], None, averaged=(False, True))
    export(choose(run), FORMATS["safetensors"], tmp_path / "raw.safetensors")
    with pytest.raises(InputError, match="does not say that they are averaged"):
        load_weights(tmp_path / "raw.safetensors", averaged=True)


def test_a_card_says_what_the_network_makes_of_an_image_that_a_formula_makes(exported):
    out, model = exported("timm")
    card = json.loads(Path(f"{out}.json").read_text())
    pixels = np.array([(i * i % 251) / 125 - 1 for i in range(3 * 12 * 12)], np.float32).reshape(1, 3, 12, 12)
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels))[0]
    np.testing.assert_allclose(card["expected"]["logits"], logits, atol=1e-6)
    assert (card["step"], card["weights"], card["model"]["heads"]) == (3, "raw", 2)
    assert "resized to 14 pixels" in card["preprocessing"]["words"]


def test_whole_images_are_told_where_the_run_evaluated_whole_images(run_folder, tmp_path, network):
    from PIL import Image
    from transformers import AutoImageProcessor

    config = {"data": {"eval_crop": "whole"}}
    run = run_folder(tmp_path / "run", network(), config=config)
    export(choose(run), FORMATS["hf"], tmp_path / "vit")
    card = json.loads((tmp_path / "vit/vit_foundry.json").read_text())
    assert "the whole image is resized to 12 × 12 pixels" in card["preprocessing"]["words"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8))
    here = EvalImages(12, 3, whole=True)(torch.from_numpy(np.array(image)).permute(2, 0, 1), 0, 0) / 127.5 - 1
    for weights in (load_weights(run), load_weights(tmp_path / "vit")):
        assert torch.allclose(weights.preprocess(image), here, atol=1e-6)
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "vit")(image, return_tensors="pt")["pixel_values"][0]
    assert (theirs - here).abs().max() < 0.02  # two of 255 levels


@pytest.mark.parametrize("name", command.FORMATS)
def test_every_export_is_equal_in_its_library_and_its_readme_says_so(name, exported, network, monkeypatch, capsys):
    out, _ = exported(name, drop=("gelu",) if FORMATS[name].lacks(network().spec) else ())
    found, not_asked = check(out)
    assert not_asked == ""
    assert {one.reader for one in found} == {"vit-foundry", FORMATS[name].library}
    assert all(one.difference < 1e-5 for one in found)
    readme = (out / "README.md" if out.is_dir() else Path(f"{out}.md")).read_text()
    script = readme.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(out if out.is_dir() else out.parent)
    capsys.readouterr()
    with torch.enable_grad():  # the script turns gradients off
        exec(script, {})
    differences = eval(capsys.readouterr().out.splitlines()[-1])
    assert max(differences.values()) < 1e-5


def test_swapped_queries_and_keys_are_found(exported):
    out, _ = exported("timm")
    tensors = load_file(out)
    query, key, value = tensors["blocks.1.attn.qkv.weight"].chunk(3)
    tensors["blocks.1.attn.qkv.weight"] = torch.cat([key, query, value])
    with safe_open(out, "pt") as file:
        described = json.loads(file.metadata()["vit_foundry"])
    del described["sha256"]  # which would tell before anything is computed
    save_file(tensors, out, {"vit_foundry": json.dumps(described)})
    found, _ = check(out)
    assert {one.reader for one in found if not one.right} == {"vit-foundry", "timm"}


@pytest.mark.parametrize("damage", [{"config": None}, {"config": {"data": None}}, {"format": ["timm"]}])
def test_a_damaged_description_is_refused(damage, exported):
    out, _ = exported("safetensors")
    with safe_open(out, "pt") as file:
        described = json.loads(file.metadata()["vit_foundry"])
    save_file(load_file(out), out, {"vit_foundry": json.dumps({**described, **damage})})
    with pytest.raises(InputError, match="its description is damaged"):
        load_weights(out)


def test_a_card_without_outputs_compares_nothing_and_is_refused(exported):
    out, _ = exported("safetensors")
    card_path = Path(f"{out}.json")
    card = json.loads(card_path.read_text())
    card_path.write_text(json.dumps({**card, "expected": {}}))
    with pytest.raises(InputError, match="its card expects nothing, and its network gives cls, mean, logits"):
        check(out)


def test_a_changed_value_is_found_when_it_is_read(exported):
    out, _ = exported("safetensors")
    data = bytearray(out.read_bytes())
    data[-3] ^= 1
    out.write_bytes(data)
    with pytest.raises(InputError, match=r"vit.safetensors: damaged or changed: the values are not those"):
        load_weights(out)


@pytest.mark.parametrize(
    ("name", "changes", "drop", "found"),
    [
        (
            "timm",
            {"representation_size": 8},
            (),
            "cannot hold these weights: representation: .*--drop representation,head, or",
        ),
        ("timm", {"representation_size": 8}, ("representation",), "--drop representation,head would be right"),
        ("timm", {}, ("representation",), "these weights have none"),
        ("timm", {}, ("tail",), "what may be dropped is representation, head, gelu"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_unless_it_is_dropped(name, changes, drop, found, exported, tmp_path):
    with pytest.raises(InputError, match=found):
        exported(name, drop, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_its_head_a_network_gives_features(exported):
    out, model = exported("timm", ("representation", "head"), representation_size=8)
    read = load_weights(out)
    assert (read.spec.num_classes, read.spec.representation_size) == (0, None)
    image = selftest.image(read.spec)
    with torch.no_grad():
        features = model(image, features=True)["cls"]
        assert torch.equal(read.model()(image, features=True)["cls"], features)
        torch.testing.assert_close(read.model()(image), features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--format", "timm"], "--out is missing"),
        (["--out", "vit.safetensors"], "--format is missing"),
        (["--format", "timm", "--out", "vit.npz"], "format timm is a .safetensors file; vit.safetensors would do"),
        (["--format", "timm", "--out", "vit.v2"], "format timm is a .safetensors file; vit.v2.safetensors would do"),
        (["--format", "timm", "--out", "run"], "exists"),
        (["--check"], "has no card"),
    ],
)
def test_bad_words_are_refused(words, found, run_folder, tmp_path, monkeypatch, network):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "run", network())
    monkeypatch.setattr(sys, "argv", ["export.py", "run", *words])
    with pytest.raises(InputError, match=found):
        command.main()
