import pytest
import torch

from finetune.config import FinetuneConfig
from finetune.head import describe_transfer, transfer
from pretrain.errors import InputError
from pretrain.model.initialization import initialize
from pretrain.model.positions import resize_positions
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer, load_tensors

SPEC = ViTSpec(
    4,
    2,
    32,
    64,
    2,
    image_size=16,
    channels=1,
    num_classes=7,
    representation_size=12,
    dropout=0.1,
    drop_path=0.1,
    gelu="tanh",
)


@pytest.fixture
def tensors():
    model = VisionTransformer(SPEC)
    initialize(model, 3)
    return model.state_dict()


def network(spec, tensors):
    model = VisionTransformer(spec).eval()
    load_tensors(model, tensors)
    return model


def images(size):
    return torch.empty(2, 1, size, size).normal_(generator=torch.Generator().manual_seed(1))


def test_the_spec_changes_in_head_size_dropout_and_drop_path_only(tensors):
    spec, _ = transfer(SPEC, tensors, num_classes=3, image_size=26)
    changes = {"num_classes": 3, "image_size": 26, "representation_size": None, "dropout": 0.0, "drop_path": 0.0}
    assert vars(spec) == {**vars(SPEC), **changes}
    again, _ = transfer(SPEC, tensors, num_classes=3, image_size=26, dropout=0.2, drop_path=0.3)
    assert (again.dropout, again.drop_path) == (0.2, 0.3)


def test_the_new_head_is_one_layer_of_zeros(tensors):
    spec, new = transfer(SPEC, tensors, num_classes=3, image_size=16)
    assert new["head.weight"].shape == (3, 32)
    assert new["head.bias"].shape == (3,)
    assert not new["head.weight"].any()
    assert not new["head.bias"].any()
    assert "representation.weight" not in new
    assert not network(spec, new)(images(16)).any()


def test_at_the_same_size_the_features_are_those_of_pretraining(tensors):
    spec, new = transfer(SPEC, tensors, num_classes=3, image_size=16)
    before = network(SPEC, tensors)(images(16), features=True)
    after = network(spec, new)(images(16), features=True)
    assert set(after) == {"cls", "mean"}
    assert torch.equal(before["cls"], after["cls"])


def test_positions_are_resized_and_everything_else_is_handed_on(tensors):
    spec, new = transfer(SPEC, tensors, num_classes=3, image_size=26)
    assert spec.grid == 6
    wanted = resize_positions(tensors["position_embedding"].double(), (6, 6), class_slot=True).float()
    assert torch.equal(new["position_embedding"], wanted)
    for name in new.keys() - {"head.weight", "head.bias", "position_embedding"}:
        assert new[name] is tensors[name]
    assert network(spec, new)(images(26)).shape == (2, 3)


@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_a_model_without_a_class_token_moves_too(positions):
    old = ViTSpec(4, 1, 32, 64, 2, image_size=16, channels=1, pool="mean", positions=positions)
    model = VisionTransformer(old)
    initialize(model, 0)
    spec, new = transfer(old, model.state_dict(), num_classes=3, image_size=24)
    assert ("position_embedding" in new) == (positions == "learned")
    assert network(spec, new)(images(24)).shape == (2, 3)


def test_weights_whose_head_was_already_dropped_are_enough(tensors):
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head", "representation"))}
    spec, new = transfer(SPEC, bare, num_classes=3, image_size=16)
    assert network(spec, new)(images(16)).shape == (2, 3)


def test_tensors_that_are_not_the_specs_model_are_refused_by_name(tensors):
    incomplete = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.norm1.bias"}
    with pytest.raises(InputError, match=r"missing: blocks\.1\.norm1\.bias"):
        transfer(SPEC, incomplete, num_classes=3, image_size=16)
    with pytest.raises(InputError, match="unexpected: ema"):
        transfer(SPEC, {**tensors, "ema": torch.zeros(1)}, num_classes=3, image_size=16)
    with pytest.raises(InputError, match="mis-shaped: class_token"):
        transfer(SPEC, {**tensors, "class_token": torch.zeros(1, 1, 8)}, num_classes=3, image_size=16)


def test_an_image_smaller_than_a_patch_is_refused(tensors):
    with pytest.raises(InputError, match=r"model\.image_size: 3 px"):
        transfer(SPEC, tensors, num_classes=3, image_size=3)


def test_the_transfer_is_described_in_one_line(tensors):
    spec, _ = transfer(SPEC, tensors, num_classes=3, image_size=26)
    assert describe_transfer(SPEC, spec) == (
        "dropped: representation layer (12) and head of 7 classes; new: head of 3, zeros; "
        "positions 4x4 → 6x6 (16 → 26 px), 2 px ignored"
    )


def test_a_tasks_run_takes_dropout_drop_path_and_what_is_frozen_from_the_task():
    task = FinetuneConfig(
        name="task",
        model={"num_classes": 3, "drop_path": 0.2},
        train={"global_batch": 8, "steps": 2, "freeze": "body"},
        optimizer={"lr": 0.1, "layer_decay": 0.7},
    )
    run = task.of(SPEC)
    assert (run.model.spec().dropout, run.model.spec().drop_path) == (0.0, 0.2)
    assert (run.train.freeze, run.optimizer.layer_decay) == ("body", 0.7)
