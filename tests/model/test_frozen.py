"""What is frozen is a fixed function, which costs a forward pass; the rest trains as if it were alone."""

import pytest
import torch

from pretrain.errors import InputError
from pretrain.model.depth import depth_of, frozen_depth
from pretrain.model.vit import VisionTransformer

FREEZES = [0, 1, 3, "body"]


@pytest.mark.parametrize("fields", [{}, {"pool": "mean", "representation_size": 12}])
def test_parameters_lie_at_depths_from_the_embedding_to_the_head(tiny, fields):
    spec = tiny(layers=3, **fields)
    at = {}
    for name, _ in VisionTransformer(spec).named_parameters():
        at.setdefault(depth_of(name, 3), set()).add(name.split(".")[0])
    tokens = {"position_embedding"} | ({"class_token"} if spec.pool == "cls" else set())
    head = {"head"} | ({"representation"} if spec.representation_size else set())
    assert at == {0: {"patch_embedding", *tokens}, 1: {"blocks"}, 2: {"blocks"}, 3: {"blocks"}, 4: {"norm"}, 5: head}
    assert {depth_of(f"blocks.{number}.mlp.fc1.bias", 30) for number in (0, 11)} == {1, 12}


def test_more_blocks_than_there_are_cannot_be_frozen():
    assert [frozen_depth(freeze, 3) for freeze in (None, *FREEZES)] == [0, 1, 2, 4, 5]
    with pytest.raises(InputError, match=r"train\.freeze: found 4, but this model has 3 blocks"):
        frozen_depth(4, 3)


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize("fields", [{}, {"pool": "mean", "representation_size": 12}])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_what_is_trained_gets_the_gradients_that_it_gets_in_the_whole_network(
    tiny, drawn, images, freeze, fields, checkpointing
):
    spec = tiny(layers=3, **fields)
    depth, batch = frozen_depth(freeze, 3), images(spec)
    whole, part = drawn(spec), drawn(spec, frozen=depth, checkpointing=checkpointing)
    outputs = [model.train()(batch) for model in (whole, part)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), other in zip(whole.named_parameters(), part.parameters(), strict=True):
        if depth_of(name, 3) < depth:
            assert other.grad is None, name
        else:
            assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("freeze", FREEZES)
def test_only_what_is_trained_drops_anything(tiny, drawn, images, freeze):
    spec = tiny(layers=3, dropout=0.5, drop_path=0.5)
    model, batch = drawn(spec, frozen=frozen_depth(freeze, 3)).train(), images(spec, 8)
    reached = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: reached.append(output))
    for _ in range(2):
        model(batch)
    still = 3 if freeze == "body" else freeze
    same = [torch.equal(*pair) for pair in zip(reached[:3], reached[3:], strict=True)]
    assert same == [True] * still + [False] * (3 - still)
    assert not model.eval().blocks[2].training


def test_activations_of_what_is_frozen_are_not_kept(tiny, drawn, images):
    def kept(freeze):
        spec, sizes = tiny(layers=4), []
        model = drawn(spec, frozen=frozen_depth(freeze, 4))
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            sizes.append(0 if tensor.data_ptr() in weights else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images(spec))
        return sum(sizes)

    assert kept("body") == 2 * 32, "the head's input alone"
    one, two, all_of_them = kept(3), kept(2), kept(0)
    assert two - one == (all_of_them - one) / 3
