"""Validation counts every sample once, on however many ranks and in whatever batches."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages, to_float
from pretrain.index.index import Index
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.ranks.collectives import World
from pretrain.record.folder import RunFolder
from pretrain.stream.loader import LoaderOptions, evaluation_batches
from pretrain.stream.section import DataSection
from pretrain.training.config import RunConfig
from pretrain.training.evaluation import Validation
from pretrain.training.loss import sigmoid_loss, softmax_loss
from pretrain.training.setup import prepare


@pytest.fixture(scope="module")
def by_hand(digits: Path) -> dict[str, float]:
    """Loss and accuracies over the whole set at once."""
    spec = ViTSpec(patch_size=4, layers=2, width=24, mlp=48, heads=2, image_size=16, channels=1, num_classes=10)
    model = VisionTransformer(spec).eval()
    initialize(model, 0)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    index = Index.open(digits / "test")
    whole = next(evaluation_batches(index, EvalImages(16, 1), LoaderOptions(workers=1), batch=index.samples))
    labels = whole.labels[:, 0]
    with torch.no_grad():
        logits = model(to_float(whole.images, torch.float32))
    order = logits.argsort(dim=1, descending=True)
    return {
        "eval/loss": F.cross_entropy(logits, labels).item(),
        "eval/top1": (order[:, 0] == labels).double().mean().item(),
        "eval/top5": (order[:, :5] == labels[:, None]).any(dim=1).double().mean().item(),
    }


@pytest.mark.parametrize(("count", "batch"), [(1, 7), (2, 32)])
def test_validation_does_not_depend_on_ranks_or_batch(count, batch, ranks, digits, by_hand, tmp_path):
    ranks(count, Path(__file__).parent / "evaluate_ranks.py", digits / "test", tmp_path / "values.json", batch)
    values = json.loads((tmp_path / "values.json").read_text())
    assert values["eval/loss"] == pytest.approx(by_hand["eval/loss"], rel=1e-6)
    assert values["eval/top1"] == by_hand["eval/top1"]
    assert values["eval/top5"] == by_hand["eval/top5"]
    assert 0 < values["eval/top1"] < values["eval/top5"] < 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_config_chooses_what_of_the_images_is_trained_on_and_evaluated(whole, digits, tmp_path):
    small = {"patch_size": 4, "layers": 1, "width": 8, "mlp": 8, "heads": 1, "image_size": 16, "channels": 1}
    data = {"train": str(digits / "train"), "eval": str(digits / "test"), "workers": 1}
    if whole:
        data |= {"crop": "tensorflow", "eval_crop": "whole"}
    config = RunConfig.model_validate(
        {
            "name": "small", "model": {**small, "num_classes": 10}, "data": data,
            "train": {"global_batch": 8, "steps": 2}, "optimizer": {"lr": 0.1}, "schedule": {"warmup_steps": 0},
        }
    )  # fmt: skip
    setup = prepare(config, None, RunFolder(tmp_path), World(0, 1, 0, torch.device("cpu")), ())
    assert setup.images.law == ("tensorflow" if whole else "torchvision")
    shown = []

    def network(images):
        shown.append(images)
        return torch.zeros(len(images), 10)

    dict(setup.evaluators[0].run(network, 1))
    index = Index.open(digits / "test")
    expected = evaluation_batches(index, EvalImages(16, 1, whole), LoaderOptions(workers=1), batch=8)
    for found, batch in zip(shown, expected, strict=True):
        assert torch.equal(found, to_float(batch.images, torch.float32))


class Oracle(torch.nn.Module):
    """Is sure of the class that an image's brightness tells: of 10 classes, 25 levels a class."""

    def forward(self, images):
        classes = (images.mean(dim=(1, 2, 3)) * 127.5 + 127.5).div(25).floor().long()
        return 20 * torch.nn.functional.one_hot(classes, 10).float()


@pytest.fixture
def validation(tmp_path, encoded, write_shards):
    """validation(labels of each image, its class): validation on images that tell their class."""

    def make(labels, classes, loss_of):
        images = dict(enumerate(encoded(np.full((16, 16), 25 * label + 12, np.uint8)) for label in classes))
        made = write_shards("set", [len(images)], labels=labels.__getitem__, suffixes=("png",), replace=images)
        alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        images = DataSection(workers=1), EvalImages(16, 1)
        return Validation(made.index, loss_of, alone, *images, batch=8, dtype=torch.float32, every=None)

    return make


@pytest.mark.parametrize("loss_of", [sigmoid_loss, softmax_loss])
def test_images_without_a_label_are_left_out_of_accuracy_and_loss_and_counted(validation, loss_of, capsys):
    classes = [number % 10 for number in range(20)]
    labels = [[label] if number % 4 else [] for number, label in enumerate(classes)]
    perfect = validation(labels, classes, loss_of)
    assert "data.eval: 5 of 20 images have no label and are left out" in capsys.readouterr().out
    found = dict(perfect.run(Oracle(), 1))
    assert (found["eval/top1"], found["eval/top5"], found["eval/unlabelled"]) == (1, 1, 5)
    logits = 20 * torch.nn.functional.one_hot(torch.tensor([3]), 10).float()
    one = loss_of(logits, torch.tensor([[3]]), torch.tensor([True]))
    assert found["eval/loss"] == pytest.approx(one.item(), rel=1e-6)


def test_a_prediction_among_the_labels_is_right(validation):
    classes = [number % 10 for number in range(20)]
    labels = [[label, (label + 1) % 10] if number % 2 else [(label + 1) % 10] for number, label in enumerate(classes)]
    found = dict(validation(labels, classes, sigmoid_loss).run(Oracle(), 1))
    assert found["eval/top1"] == 0.5
    assert "eval/unlabelled" not in found


def test_a_set_without_any_label_is_refused(validation):
    with pytest.raises(InputError, match=r"data\.eval: none of the 3 images has a label"):
        validation([[], [], []], [0, 1, 2], partial(sigmoid_loss))
