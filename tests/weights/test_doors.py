"""What Python users find in `pretrain`: the network of a checkpoint, its preprocessing, and what importing it costs."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from pretrain.configfile import read_config
from pretrain.errors import InputError
from pretrain.images.decode import decode
from pretrain.images.transforms import EvalImages, to_float
from pretrain.index.index import Index
from pretrain.model.initialization import initialize
from pretrain.model.positions import resize_positions
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.weights.load import load_weights

ROOT = Path(__file__).parents[2]


def network(**fields):
    sizes = {"patch_size": 2, "layers": 1, "width": 16, "mlp": 32, "heads": 2, "image_size": 8, "channels": 3}
    model = VisionTransformer(ViTSpec(**{**sizes, "num_classes": 10, **fields}))
    initialize(model, 0)
    return model


def test_the_doors_are_those_of_the_rooms(monkeypatch):
    assert pretrain.read_config is read_config
    assert pretrain.load_weights is load_weights
    assert pretrain.open_index == Index.open
    monkeypatch.setattr("pretrain.training.experiment.run", lambda *given, **options: (given, options))
    assert pretrain.run("config", "out", extend=True) == (("config", "out"), {"extend": True})
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        pretrain.walk  # noqa: B018


def test_importing_pretrain_is_cheap_and_weights_need_no_trainer():
    code = (
        "import sys, pretrain\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "pretrain.load_weights\n"
        "import pretrain.plan.flops, pretrain.plan.peak, pretrain.weights.fill\n"
        "assert 'torch' in sys.modules\n"
        "heavy = {'deepspeed', 'pretrain.engine', 'pretrain.training', 'webdataset', 'tensorboard'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_network_has_the_checkpoints_weights_and_does_not_train(run_folder, tmp_path):
    model = network(dropout=0.5)
    loaded = pretrain.load_weights(run_folder(tmp_path / "run", model)).model()
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_another_size_resizes_the_positions(run_folder, tmp_path):
    weights = pretrain.load_weights(run_folder(tmp_path / "run", network()))
    expected = resize_positions(weights.tensors["position_embedding"], (8, 8), class_slot=True)
    assert torch.equal(weights.model(16).position_embedding, expected)
    with pytest.raises(InputError, match="image_size"):
        weights.model(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_preprocessed_as_evaluation_does(channels, run_folder, tmp_path):
    weights = pretrain.load_weights(run_folder(tmp_path / "run", network(channels=channels)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 4 if channels == 3 else 3), dtype=np.uint8)
    image, encoded = Image.fromarray(pixels), io.BytesIO()
    image.save(encoded, "PNG")
    evaluated = EvalImages(8, channels)(decode(encoded.getvalue(), channels), 0, 0)
    found = weights.preprocess(image)
    assert (found.shape, found.dtype) == ((channels, 8, 8), torch.float32)
    assert torch.equal(found, to_float(evaluated, torch.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_16_bits_is_scaled_and_not_clipped(channels, run_folder, tmp_path):
    weights = pretrain.load_weights(run_folder(tmp_path / "run", network(channels=channels)))
    image, encoded = Image.fromarray(np.linspace(0, 65535, 24 * 30).astype(np.uint16).reshape(24, 30)), io.BytesIO()
    image.save(encoded, "PNG")
    evaluated = EvalImages(8, channels)(decode(encoded.getvalue(), channels), 0, 0)
    assert evaluated.float().std() > 10
    for one in (image, Image.open(encoded)):
        assert torch.equal(weights.preprocess(one), to_float(evaluated, torch.float32))


def test_readmes_notebook_runs(run_folder, tmp_path, monkeypatch):
    """The code under "In a notebook", on a small run and one image."""
    section = (ROOT / "README.md").read_text().partition("## In a notebook")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    run_folder(tmp_path / "runs/imagenet1k-b16", network())
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert len(code.splitlines()) <= 12
    assert names["features"]["cls"].shape == (1, 16)
