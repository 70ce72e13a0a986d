"""Weights that were trained on images normalised in another way are the same function of an image here."""

import json
import sys

import pytest
import torch

from launch import export as command
from pretrain.errors import InputError
from pretrain.weights.formats.table import to_file
from pretrain.weights.load import load_weights
from pretrain.weights.pixels import Normalisation, fold
from pretrain.weights.read import FORMATS

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIZES = {"layers": 12, "width": 192, "mlp": 768, "heads": 3, "patch_size": 16, "image_size": 32}  # as timm's Ti/16


def elsewhere(path, model, name="timm"):
    """A file as timm's users have it: its tensors and nothing else."""
    tensors = model.state_dict()
    torch.save({row.name: to_file(row, tensors, model.spec) for row in FORMATS[name].rows(model.spec)}, path)
    return path


def test_the_patch_embedding_takes_up_mean_and_std(network):
    model = network(0)
    images = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    with torch.no_grad():
        theirs = model((images - mean).div(std).float())
        model.load_state_dict(fold(model.state_dict(), IMAGENET, where="it"))
        here = model((2 * images - 1).float())
    assert torch.allclose(theirs, here, atol=1e-5)
    with pytest.raises(InputError, match="is for 3 channels, the network has 1"):
        fold(network(0, channels=1).state_dict(), IMAGENET, where="it")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("preprocessor_config.json", {"image_mean": IMAGENET.mean, "image_std": IMAGENET.std}),
        ("config.json", {"pretrained_cfg": {"mean": IMAGENET.mean, "std": IMAGENET.std}}),
    ],
)
def test_a_file_beside_the_weights_tells(name, content, network, tmp_path, capsys):
    from safetensors.torch import save_file

    model = network(0, **SIZES)
    tensors = model.state_dict()
    rows = FORMATS["timm"].rows(model.spec)
    save_file(
        {row.name: to_file(row, tensors, model.spec).contiguous() for row in rows}, tmp_path / "model.safetensors"
    )
    (tmp_path / name).write_text(json.dumps(content))
    read = load_weights(tmp_path)
    assert "trained on images of mean 0.485 0.456 0.406, std" in capsys.readouterr().out
    wanted = fold(tensors, IMAGENET, where="it")
    assert all(torch.equal(value, read.tensors[key]) for key, value in wanted.items())
    (tmp_path / name).write_text(json.dumps(json.loads(json.dumps(content).replace("0.229", "0.0"))))
    with pytest.raises(InputError, match="are no normalisation"):
        load_weights(tmp_path)


def hf_folder(path, model, preprocessor=None, **config):
    from safetensors.torch import save_file

    path.mkdir()
    tensors, form = model.state_dict(), FORMATS["hf"]
    rows = form.rows(model.spec)
    save_file({row.name: to_file(row, tensors, model.spec).contiguous() for row in rows}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**form.companions(model.spec, False)["config.json"], **config}))
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor or {}))
    return path


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"do_normalize": False}, "do_normalize is False, and only True is read"),
        ({"do_rescale": False}, "do_rescale is False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ({"image_mean": [float("nan")] * 3}, "are no normalisation"),
    ],
)
def test_pixels_of_another_scale_are_refused(said, found, network, tmp_path):
    usual = {
        "do_normalize": True,
        "rescale_factor": 0.00392156862745098,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    load_weights(hf_folder(tmp_path / "right", network(0), usual))
    with pytest.raises(InputError, match=found):
        load_weights(hf_folder(tmp_path / "wrong", network(0), {**usual, **said}))


def test_more_blocks_than_tensors_are_refused_before_they_are_built(network, tmp_path):
    with pytest.raises(InputError, match="says that it is of 10000000 blocks, but holds 40 tensors"):
        load_weights(hf_folder(tmp_path / "vit", network(0), num_hidden_layers=10**7))


@pytest.mark.parametrize(("key", "value"), [("model_args", None), ("model_args", "x"), ("pretrained_cfg", "x")])
def test_a_strange_config_of_timms_is_no_traceback(key, value, network, tmp_path):
    from safetensors.torch import save_file

    model = network(0, **SIZES)
    rows, tensors = FORMATS["timm"].rows(model.spec), model.state_dict()
    save_file(
        {row.name: to_file(row, tensors, model.spec).contiguous() for row in rows}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", key: value}))
    if (key, value) == ("model_args", "x"):
        with pytest.raises(InputError, match="model_args: an object was expected"):
            load_weights(tmp_path)
    else:
        load_weights(tmp_path)


def test_a_file_that_does_not_tell_is_noted_and_the_command_can_tell(network, tmp_path, monkeypatch, capsys):
    model = network(0, **SIZES)
    path = elsewhere(tmp_path / "vit.pth", model)
    assert torch.equal(load_weights(path).tensors["patch_embedding.bias"], model.patch_embedding.bias)
    assert f"weights {path}: does not say how images were normalised" in capsys.readouterr().out
    out = tmp_path / "vit.safetensors"
    words = ["--format", "safetensors", "--out", str(out), "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]
    monkeypatch.setattr(sys, "argv", ["export.py", str(path), *words])
    assert command.main() == 0
    capsys.readouterr()
    read = load_weights(out)
    assert torch.equal(
        read.tensors["patch_embedding.bias"], fold(model.state_dict(), IMAGENET, where="")["patch_embedding.bias"]
    )
    assert "normalised" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["export.py", str(out), *words[:3], str(tmp_path / "b.safetensors"), *words[4:]])
    with pytest.raises(InputError, match="say how images are normalised"):
        command.main()
