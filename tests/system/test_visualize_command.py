"""launch/visualize.py from the outside: statuses, messages, files."""

import json

import pytest
import torch

from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

COMMAND = "launch/visualize.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_folder):
    """A run folder whose averaged weights are others."""
    spec = ViTSpec(patch_size=2, layers=2, width=16, mlp=16, heads=2, image_size=8, channels=1, num_classes=10)
    model, average = VisionTransformer(spec), VisionTransformer(spec)
    initialize(model, 0)
    initialize(average, 1)
    return run_folder(tmp_path_factory.mktemp("runs") / "run", model, average=average)


def test_a_look_with_images_of_shards(trained, digits, tmp_path, run):
    out = tmp_path / "new" / "out"
    done = run(COMMAND, "--init", trained, "--images", digits / "test", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "attention over 128 of 355 images" in done.stdout
    assert f"page: {out / 'index.html'}" in done.stdout
    layers = torch.tensor(json.loads((out / "inside.json").read_text())["attention_distance"]["layers"])
    assert layers.shape == (2, 2)
    assert ((layers > 0) & (layers < 6 * 2**0.5)).all()


def test_averaged_weights_without_images(trained, tmp_path, run):
    sums = {}
    for kind in ("raw", "averaged"):
        done = run(COMMAND, "--init", trained, "--weights", kind, "--out", tmp_path / kind)
        assert done.returncode == 0, done.stderr
        assert "no --images" in done.stdout
        weights = json.loads((tmp_path / kind / "inside.json").read_text())["weights"]
        assert weights["averaged"] == (kind == "averaged")
        sums[kind] = weights["sha256"]
    assert sums["raw"] != sums["averaged"]


def test_what_is_at_fault_is_named_with_status_2(trained, tmp_path, run):
    (tmp_path / "file").touch()
    for words, message in [
        (("--init", tmp_path / "gone", "--out", tmp_path / "out"), "no such file or folder"),
        (("--init", trained, "--out", tmp_path / "file"), "something else has this name"),
        (("--init", trained, "--images", tmp_path / "gone.png", "--out", tmp_path / "out"), "gone.png: no such"),
        (("--init", trained, "--images", tmp_path / "file", "--out", tmp_path / "out"), "not an image"),
        (("--init", trained), "--out"),
    ]:
        done = run(COMMAND, *words)
        assert done.returncode == 2, (words, done.stderr)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
