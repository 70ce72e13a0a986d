"""What a run's beginning says of a network and data that do not fit, and of keys that are idle."""

import json

import numpy as np
import pytest
import torch

from finetune.config import FinetuneConfig
from pretrain.configfile import read_config
from pretrain.datasets.dataset import Dataset, png
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.ranks.collectives import World
from pretrain.record.folder import RunFolder
from pretrain.shards.write import write_shards
from pretrain.stream.colour import count_coloured
from pretrain.training.config import RunConfig
from pretrain.training.notes import check_fit, empty_classes, idle_keys, trained_on
from pretrain.training.setup import prepare
from tests.conftest import encode

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SIZES = {"patch_size": 2, "layers": 1, "width": 16, "mlp": 32, "heads": 2, "image_size": 8}
GREY = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def shards(tmp_path):
    """shards(labels, pixels, classes): the folder of a data set of as many images, all alike."""

    def shards(labels, pixels=COLOUR, classes=None):
        name = f"set{len(list(tmp_path.glob('set*')))}"
        read = (lambda row: ("jpg", pixels)) if isinstance(pixels, bytes) else (lambda row: ("png", png(pixels)))
        data = Dataset(name, "all", np.int32(labels), None, classes, name, read)
        return str(write_shards(data, tmp_path / name)[0].parent)

    return shards


@pytest.fixture
def config(tmp_path):
    """config(*overrides, model=…): a small config."""

    def config(*overrides, schema=RunConfig, **model):
        tree = {
            "name": "small",
            "model": {**(SIZES if schema is RunConfig else {}), **model},
            "train": {"global_batch": 4, "steps": 10},
            "optimizer": {"lr": 0.1},
            "schedule": {"warmup_steps": 0},
        }
        (tmp_path / "small.json").write_text(json.dumps(tree))
        return read_config(schema, tmp_path / "small.json", overrides)

    return config


def test_outputs_that_no_image_has_are_told(shards, config):
    index = Index.open(shards([0, 1, 2, 1]))
    (note,) = check_fit(config(num_classes=18_291), index, None)
    assert note == (
        "model.num_classes: the network has 18,291 outputs, data.train has 3 classes: outputs 3 … 18,290 will never "
        "see an image; model.num_classes=3 would be right for these data"
    )
    assert "output 3 will never" in check_fit(config(num_classes=4), index, None)[0]
    assert check_fit(config(num_classes=3), index, None) == []


def test_a_numbering_that_is_taken_on_trust_is_told(shards, config):
    train, other = shards([0, 1, 2, 1], classes=("ant", "bee", "cat")), shards([0, 1, 2, 1], GREY)
    sizes = {"num_classes": 3, "channels": 3}

    def notes(**data):
        given = config(*(f"data.{key}={json.dumps(value)}" for key, value in data.items()), **sizes)
        return list(prepare(given, None, RunFolder("out"), ALONE, ()).notes)

    assert not [note for note in notes(train=train) if "names" in note]
    found = notes(train=train, eval=other)
    assert f"{other}/index.vfi: without names of its classes, taken to number them as {train}/index.vfi does" in found
    assert "taken to number them" in "".join(notes(train=[train, other]))
    with pytest.raises(InputError, match=r"has labels up to 3, and .* names 3 classes"):
        notes(train=[train, shards([0, 3], GREY)])


def test_classes_named_otherwise_are_told_before_their_number(shards, config):
    train = str(shards([0, 1], classes=("ant", "bee")))
    other = str(shards([0, 1, 2], classes=("ant", "ape", "bee")))
    with pytest.raises(InputError, match=r"data\.eval.*ape"):
        prepare(config(f"data.train={train}", f"data.eval={other}", num_classes=2), None, RunFolder("out"), ALONE, ())


def test_named_classes_count_though_they_hold_no_image(shards, config):
    index = Index.open(shards([0, 1, 1], classes=("ant", "bee", "cat", "dog")))
    assert check_fit(config(num_classes=4), index, None) == []
    assert empty_classes(index, None) == ["data.train: 2 of 4 classes hold no image: 2 'cat', 3 'dog'"]


def test_a_numbering_from_one_shows_as_an_empty_class(shards):
    assert empty_classes(Index.open(shards([1, 2, 3])), None) == ["data.train: 1 of 4 classes hold no image: 0"]


def test_data_without_any_label_are_refused(tmp_path, config):
    data = Dataset("none", "all", np.int32([]), np.zeros(3, int), None, "none", lambda row: ("png", png(COLOUR)))
    index = Index.open(write_shards(data, tmp_path / "none")[0])
    with pytest.raises(InputError, match=r"data\.train: no image has a label"):
        check_fit(config(num_classes=2), index, None)


def test_images_that_sigmoid_trains_as_of_no_class_are_told(tmp_path, config):
    starts = np.array([0, 1, 1, 3, 3])  # two of four lists are empty
    data = Dataset("some", "all", np.int32([0, 1, 0]), starts, None, "some", lambda row: ("png", png(COLOUR)))
    index, _ = write_shards(data, tmp_path / "some")
    setting = config(f"data.train={index}", "train.loss=sigmoid", num_classes=2)
    notes = prepare(setting, None, RunFolder(tmp_path / "run"), ALONE, ()).notes
    assert notes == ["data.train: 2 of 4 images have no label and are trained as images of no class"]


def test_images_that_are_all_of_one_class_are_told(shards):
    assert empty_classes(Index.open(shards([0, 0])), None) == [
        "data.train: all images are of class 0: nothing to tell apart"
    ]


def test_what_is_validated_and_never_trained_is_told(shards):
    train, evaluated = Index.open(shards([0, 1, 3])), Index.open(shards([0, 2, 2, 4]))
    assert empty_classes(train, evaluated)[1] == (
        "data.eval: 3 of 4 labels are of classes without an image in data.train: 2, 4"
    )
    assert len(empty_classes(train, Index.open(shards([0, 3])))) == 1


def test_validation_on_training_images_is_told(shards):
    train, other = shards([0, 1, 3]), shards([0, 1], GREY)
    found = trained_on(Index.open(train), Index.open([other, train]))
    assert found[0].startswith("data.eval: 3 of 5 images are in data.train too (shard ")
    assert trained_on(Index.open(train), Index.open(other)) == trained_on(Index.open(train), None) == []


@pytest.mark.parametrize(
    ("pixels", "coloured"),
    [
        (GREY, 0),
        (COLOUR, 4),
        (np.stack([GREY] * 3, axis=-1), 0),  # grey, stored as RGB
        (encode(np.stack([GREY] * 3, axis=-1), "JPEG"), 0),
        (encode(np.repeat(np.repeat(COLOUR[:2, :2], 16, axis=0), 16, axis=1), "JPEG"), 4),
        (b"\xff\xd8 no image", None),
    ],
)
def test_colour_is_known_by_the_pixels(pixels, coloured, shards):
    index = Index.open(shards([0, 1, 0, 1], pixels))
    assert count_coloured(index) == ((0, 0) if coloured is None else (coloured, 4))


def test_a_grey_network_of_images_in_colour_is_told_and_the_reverse(shards, config):
    grey, coloured = Index.open(shards([0, 1], GREY)), Index.open(shards([0, 1]))
    (note,) = check_fit(config(num_classes=2, channels=1), coloured, None)
    assert "takes grey images, and 2 of 2 images looked at in data.train are in colour, which is dropped" in note
    assert "in data.eval are in colour" in check_fit(config(num_classes=2, channels=1), grey, coloured)[0]
    (note,) = check_fit(config(num_classes=2), grey, None)
    assert "takes RGB images, and none of 2 images looked at in data.train is in colour" in note
    assert (
        check_fit(config(num_classes=2, channels=1), grey, None)
        == check_fit(config(num_classes=2), coloured, None)
        == []
    )


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"num_classes": 37}, "the network has 37 outputs, data.train has 3 classes"),
        ({"num_classes": 3, "channels": 1}, "takes grey images"),
    ],
)
def test_fine_tuning_refuses_what_does_not_fit_unless_asked(network, words, shards, config, tmp_path):
    folder, run = shards([0, 1, 2, 1]), RunFolder(tmp_path / "run")
    assert config(schema=FinetuneConfig, num_classes=3).data.mismatch == "refuse"
    setting = config(f"data.train={folder}", "data.mismatch=refuse", **network)
    with pytest.raises(InputError, match=f"{words}.*, or data.mismatch=note to train all the same"):
        prepare(setting, None, run, ALONE, ())
    setup = prepare(config(f"data.train={folder}", **network), None, run, ALONE, ())
    assert words in setup.notes[0]


def test_a_grey_task_is_fine_for_an_rgb_network(shards, config):
    index = Index.open(shards([0, 1], GREY))
    assert "takes RGB images" in check_fit(config("data.mismatch=refuse", num_classes=2), index, None)[0]


def test_softmax_trains_on_lists_of_one_label(tmp_path, config):
    data = Dataset("ones", "all", np.int32([0, 1, 1, 0]), np.arange(5), None, "ones", lambda row: ("png", png(COLOUR)))
    index, _ = write_shards(data, tmp_path / "ones")
    setting = config(f"data.train={index}", f"data.eval={index}", num_classes=2)
    setup = prepare(setting, None, RunFolder(tmp_path / "run"), ALONE, ())
    assert (setup.index.multilabel, len(setup.evaluators)) == (True, 1)
    (note,) = setup.notes
    assert note.startswith("data.eval: 4 of 4 images are in data.train too (shard ")


def test_an_evaluation_of_several_labels_under_softmax_has_accuracies_and_no_loss(tmp_path, config, shards):
    data = Dataset(
        "two", "all", np.int32([0, 1, 1]), np.array([0, 2, 3]), None, "two", lambda row: ("png", png(COLOUR))
    )
    index, _ = write_shards(data, tmp_path / "two")
    setting = config(f"data.train={shards([0, 1, 1])}", f"data.eval={index}", num_classes=2)
    (validation,) = prepare(setting, None, RunFolder(tmp_path / "run"), ALONE, ()).evaluators

    def network(images):
        return torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)

    assert dict(validation.run(network, 1)) == {"eval/top1": 0.5, "eval/top5": 1.0}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ""),
        (
            ["schedule.warmup_steps=1000"],
            "schedule.warmup_steps: 1,000 warm-up steps are not over within the run's 10: the learning rate ends at "
            "0.0009 of 0.1",
        ),
        (["schedule.warmup_steps=10"], "schedule.warmup_steps: 10 warm-up steps are not over"),
        (
            ["checkpoint.every=11", "optimizer.averaging.start_step=500"],
            "beyond the end of the run's 10 steps: checkpoint.every 11, optimizer.averaging.start_step 500",
        ),
        (["train.eval_every=5"], "train.eval_every: 5, but data.eval is not set: nothing is validated"),
        (["optimizer.momentum=0.8"], 'optimizer.momentum: 0.8 is of no effect with optimizer.name "adamw"'),
        (
            ["optimizer.name=sgd", "optimizer.betas=[0.9,0.95]"],
            'optimizer.betas: (0.9, 0.95) is of no effect with optimizer.name "sgd"',
        ),
        (
            ["schedule.decay=constant", "schedule.final_lr=0.01"],
            'schedule.final_lr: 0.01 is of no effect with schedule.decay "constant"',
        ),
        (["data.chunk=17"], "data.chunk, data.lanes: 4 lanes of 17 samples are more than the 64 of data.train"),
        (["data.lanes=9"], "data.chunk, data.lanes: 9 lanes of 8 samples are more"),
        (["model.image_size=9"], "model.image_size: the last 1 rows and columns of 9 px fill no patch of"),
        (["model.head_bias=-7"], 'model.head_bias: -7.0 is of no effect with train.loss "softmax"'),
        (["train.guard.margin=7"], 'train.guard.margin: 7 is of no effect with train.guard.then "stop"'),
        (
            ["deepspeed.zero_optimization.stage=1", "deepspeed.zero_optimization.stage3_max_live_parameters=1e9"],
            "deepspeed.zero_optimization: stage3_max_live_parameters of no effect at stage 1",
        ),
    ],
)
def test_what_a_config_says_in_vain_is_told(overrides, words, config):
    found = idle_keys(config(*overrides, num_classes=2), steps=10, samples=64)
    assert [note[: len(words)] for note in found] == ([words] if words else [])
