"""For the logits the last block computes the class token alone: function and gradients are those of the whole block."""

import pytest
import torch

CHECKPOINTING = ["none", "full", "selective", 1, 2]
OPTIONS = [{}, {"representation_size": 12}, {"qkv_bias": False, "gelu": "tanh"}, {"layers": 1}]


def gradients(model, batch, whole):
    """Logits, and the gradients of a loss of them; `whole`: with every token of the last block."""
    torch.manual_seed(3)  # drop path
    if whole:
        features = model(batch, features=True)
        logits = model.head(features.get("tanh", features["cls"]))
    else:
        logits = model(batch)
    logits.square().sum().backward()
    found = [logits.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad()
    return found


def worst(found, wanted):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("fields", [*OPTIONS, {"layers": 3, "drop_path": 0.6}])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_logits_and_gradients_are_the_whole_blocks(tiny, drawn, images, fields, dtype, most):
    spec = tiny(**fields)
    model, batch = drawn(spec, dtype=dtype).train(), images(spec, 6, dtype)
    assert worst(gradients(model, batch, whole=False), gradients(model, batch, whole=True)) < most


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_every_kind_of_checkpointing_gives_the_same_bits(tiny, drawn, images, checkpointing):
    spec = tiny(dropout=0.3, drop_path=0.4, layers=3)
    plain, other = (drawn(spec, checkpointing=way).train() for way in ("none", checkpointing))
    pairs = zip(*(gradients(model, images(spec), whole=False) for model in (plain, other)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_partitioned_weights_give_the_same_bits(tiny, drawn, images):
    """As under ZeRO 3, which marks its parameters. The backward pass keeps views of no weight but the last qkv's."""
    spec, kept = tiny(), []
    plain, marked = drawn(spec), drawn(spec)
    for parameter in marked.parameters():
        parameter.ds_id = 0
    weights = {parameter.untyped_storage().data_ptr(): parameter for parameter in marked.blocks.parameters()}

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = gradients(marked, images(spec), whole=False)
    held = [(tensor, weights.get(tensor.untyped_storage().data_ptr())) for tensor in kept]
    assert sum(weight is not None for _, weight in held) > 8
    viewed = {id(weight) for tensor, weight in held if weight is not None and tensor is not weight}
    assert viewed == {id(marked.blocks[-1].attention.qkv.weight)}
    assert all(torch.equal(*pair) for pair in zip(found, gradients(plain, images(spec), whole=False), strict=True))


def test_only_the_class_token_leaves_the_last_block_unless_features_are_read(tiny, drawn, images):
    seen = []
    for spec in (tiny(), tiny(pool="mean")):
        model = drawn(spec)
        for block in model.blocks:
            block.register_forward_hook(lambda block, inputs, output: seen.append(output.shape[1]))
        model(images(spec))
        model(images(spec), features=True)
    assert seen == [5, 1, 5, 5, 4, 4, 4, 4]
