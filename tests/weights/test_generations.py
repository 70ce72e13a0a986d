"""transformers before and after the tensors' names changed: each reads our files, and we read the files of each."""

import json
import os
import subprocess
import sys

import pytest
import torch

from pretrain.weights.export import export
from pretrain.weights.load import choose, load_weights
from pretrain.weights.read import FORMATS

OLDER = "4.57.6"  # the newest version of the generation before
SIZES = {"patch_size": 4, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}

# Writes a network of each class with random tensors, and what each makes of the images; and what our folders give.
SCRIPT = """
import json, sys
import torch, transformers
from transformers import ViTConfig, ViTForImageClassification, ViTModel

folder, sizes = sys.argv[1], json.loads(sys.argv[2])
images = torch.load(f"{folder}/images.pt")
found = {"version": transformers.__version__, "file": transformers.__file__}
torch.manual_seed(0)
with torch.no_grad():
    for kind in (ViTForImageClassification, ViTModel):
        model = kind(ViTConfig(**sizes, image_size=12, num_labels=5)).eval()
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(f"{folder}/{kind.__name__}")
        found[kind.__name__] = model(images)[int(kind is ViTModel)].tolist()
    model, report = ViTForImageClassification.from_pretrained(f"{folder}/classifier", output_loading_info=True)
    found["classifier"] = model.eval()(images).logits.tolist()
    found["classifier's report"] = [len(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    model, report = ViTModel.from_pretrained(f"{folder}/pooler", output_loading_info=True)
    found["pooler"] = model.eval()(images).pooler_output.tolist()
    found["pooler's report"] = [len(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A folder that holds the older version and what it needs, but for torch."""
    folder = tmp_path_factory.mktemp("transformers")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, f"transformers=={OLDER}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"transformers {OLDER} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("generation", ["older", "present"])
def test_files_go_both_ways(generation, older, run_folder, network, tmp_path):
    ours = {"classifier": network(), "pooler": network(num_classes=0, representation_size=16)}
    for name, model in ours.items():
        export(choose(run_folder(tmp_path / f"run-{name}", model)), FORMATS["hf"], tmp_path / name)
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    torch.save(images, tmp_path / "images.pt")

    path = {"PYTHONPATH": str(older)} if generation == "older" else {}
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, json.dumps(SIZES)],
        cwd=tmp_path, env={**os.environ, **path, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    assert (found["version"] == OLDER) == (generation == "older")

    with torch.no_grad():
        for name, model in ours.items():
            assert found[f"{name}'s report"] == [0, 0, 0]
            torch.testing.assert_close(torch.tensor(found[name]), model(images), atol=1e-5, rtol=0)
        for name in ("ViTForImageClassification", "ViTModel"):
            model = load_weights(tmp_path / name).model()
            torch.testing.assert_close(model(images), torch.tensor(found[name]), atol=1e-5, rtol=0)
