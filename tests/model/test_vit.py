from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.errors import InputError
from pretrain.model.initialization import initialize
from pretrain.model.spec import ARCHITECTURES, spec_from_arch
from pretrain.model.vit import VisionTransformer, load_tensors, tensor_shapes


def on_meta(spec):
    with torch.device("meta"):
        return VisionTransformer(spec)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_the_published_ones():
    assert parameters(on_meta(spec_from_arch("vit_h_14", representation_size=1280))) == 633_685_480
    assert parameters(on_meta(spec_from_arch("vit_b_16", representation_size=768))) == 87_158_248
    # Fine-tuning form, as timm and torchvision count it.
    published = {
        "vit_ti_16": 5_717_416,
        "vit_s_16": 22_050_664,
        "vit_b_16": 86_567_656,
        "vit_b_32": 88_224_232,
        "vit_l_16": 304_326_632,
        "vit_l_32": 306_535_400,
        "vit_h_14": 632_045_800,
    }
    assert {name: parameters(on_meta(spec_from_arch(name))) for name in ARCHITECTURES} == published


def test_h14_has_the_layers_shapes_and_counts_of_its_summary():
    model = on_meta(spec_from_arch("vit_h_14", representation_size=1280))
    shapes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)}))
    model(torch.empty(2, 3, 224, 224, device="meta"))

    assert model.class_token.numel() == 1_280
    assert model.position_embedding.numel() + parameters(model.norm) + 32 * 19_677_440 == 630_009_600
    summary = [
        ("patch_embedding", (2, 256, 1280), 753_920),
        ("dropout", (2, 257, 1280), 0),
        *((f"blocks.{i}", (2, 257, 1280), 19_677_440) for i in range(31)),
        ("blocks.31", (2, 1, 1280), 19_677_440),  # the class token's output, which the logits need
        ("norm", (2, 1280), 2_560),
        ("representation", (2, 1280), 1_639_680),
        ("head", (2, 1000), 1_281_000),
    ]
    for name, shape, count in summary:
        assert (name, shapes[name], parameters(model.get_submodule(name))) == (name, shape, count)
    assert model.position_embedding.numel() == 328_960
    assert shapes[""] == (2, 1000)


def test_features_hold_the_class_token_the_mean_and_both_sides_of_the_tanh(tiny, drawn, images):
    spec = tiny(representation_size=12)
    model, batch = drawn(spec), images(spec, 3)
    tokens = []
    model.norm.register_forward_hook(lambda _, __, out: tokens.append(out))
    features = model(batch, features=True)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "cls": (3, 32),
        "mean": (3, 32),
        "pre_tanh": (3, 12),
        "tanh": (3, 12),
    }
    assert torch.equal(features["cls"], tokens[0][:, 0])
    assert torch.equal(features["mean"], tokens[0][:, 1:].mean(dim=1))
    assert torch.equal(features["tanh"], features["pre_tanh"].tanh())
    torch.testing.assert_close(model.head(features["tanh"]), model(batch), rtol=0, atol=1e-6)
    assert set(drawn(tiny())(batch, features=True)) == {"cls", "mean"}


def test_average_pooling_has_no_class_token_and_its_features_are_the_mean(tiny, drawn, images):
    spec = tiny(pool="mean")
    model, batch = drawn(spec), images(spec)
    assert "class_token" not in model.state_dict()
    assert model.position_embedding.shape == (1, 4, 32)
    features = model(batch, features=True)
    assert torch.equal(features["cls"], features["mean"])
    torch.testing.assert_close(model.head(features["mean"]), model(batch), rtol=0, atol=1e-6)


def test_fixed_positions_leave_no_tensor_in_the_state_and_still_tell_patches_apart(tiny, drawn, images):
    spec = tiny(pool="mean", positions="sincos2d")
    model, batch = drawn(spec), images(spec)
    assert not [name for name in model.state_dict() if "position" in name]
    assert not list(model.buffers())
    swapped = batch.roll(8, dims=3)
    assert (model(batch) - model(swapped)).abs().max() > 1e-3

    bare = tiny(pool="mean")
    without = drawn(bare)
    nn.init.zeros_(without.position_embedding)
    torch.testing.assert_close(without(batch), without(swapped), rtol=0, atol=1e-5)


def test_fixed_positions_leave_the_class_token_without_one(tiny, drawn, images):
    spec = tiny(positions="sincos2d")
    model = drawn(spec)
    tokens = model.embed(images(spec))
    assert tokens.shape == (2, 5, 32)
    assert torch.equal(tokens[:, 0], model.class_token[0].expand(2, -1))


def test_tanh_gelu_is_another_function_than_exact_gelu(tiny, drawn, images):
    exact, tanh = drawn(tiny()), drawn(tiny(gelu="tanh"))
    difference = (exact(images(tiny())) - tanh(images(tiny()))).abs().max()
    assert 1e-7 < difference < 1e-2
    x = torch.tensor(1.5)
    assert torch.equal(tanh.blocks[0].mlp.gelu(x), nn.functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_other_than_three(tiny, drawn, images, channels):
    spec = tiny(channels=channels)
    assert drawn(spec)(images(spec)).shape == (2, 5)


def test_pixels_beyond_the_last_whole_patch_are_ignored(tiny, drawn, images):
    spec = tiny(image_size=22)
    model, batch = drawn(spec), images(spec)
    assert spec.grid == 2
    changed = batch.clone()
    changed[:, :, 16:] += 1
    changed[:, :, :, 16:] += 1
    assert torch.equal(model(batch), model(changed))
    changed[:, :, 15] += 1
    assert not torch.equal(model(batch), model(changed))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 15, 16),
        torch.zeros(2, 3, 24, 24),
        torch.zeros(2, 1, 16, 16),
        torch.zeros(3, 16, 16),
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
    ],
)
def test_images_of_another_shape_or_type_are_refused_with_what_is_right(tiny, drawn, wrong):
    with pytest.raises(InputError) as refused:
        drawn(tiny())(wrong)
    assert str(list(wrong.shape)) in str(refused.value)
    assert str(wrong.dtype) in str(refused.value)
    assert "floating-point [b, 3, 16, 16]" in str(refused.value)


def test_dropout_is_active_in_training_only(tiny, drawn, images):
    spec = tiny(dropout=0.5)
    model, batch = drawn(spec), images(spec)
    assert not torch.equal(model.train()(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))
    assert torch.equal(model(batch), drawn(tiny())(batch))


def gradients(model, batch):
    """Logits, and the gradients of a loss of them."""
    torch.manual_seed(3)
    logits = model(batch)
    logits.square().sum().backward()
    return [logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", ["full", "selective", 1, 2])
def test_checkpointed_blocks_give_the_same_gradients_bit_for_bit(tiny, drawn, images, dropout, checkpointing):
    spec = tiny(dropout=dropout, representation_size=12)
    plain, checkpointed = (gradients(drawn(spec, checkpointing=way), images(spec)) for way in ("none", checkpointing))
    assert all(torch.equal(*pair) for pair in zip(plain, checkpointed, strict=True))


def test_checkpointed_blocks_keep_less_for_the_backward_pass(tiny, drawn, images):
    def kept(checkpointing):
        spec, sizes = tiny(layers=4), []
        model = drawn(spec, checkpointing=checkpointing)
        weights = {parameter.data_ptr() for parameter in model.parameters()}

        def pack(tensor):
            sizes.append(0 if tensor.data_ptr() in weights else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(images(spec))
        return sum(sizes)

    assert kept("full") < kept("none") / 4
    assert kept("full") < kept(2) < kept(3) < kept(4) < kept("none")  # 4, 2, 2 and 1 of the four blocks


@pytest.mark.parametrize(
    ("checkpointing", "again"),
    [
        ("none", {}),
        # The last product of a block is not needed. Of the last block's attention the softmax stands for the whole.
        ("full", {"native_layer_norm": 8, "gelu": 4, "attention": 3, "_softmax": 1, "addmm": 12}),
        (2, {"native_layer_norm": 4, "gelu": 2, "attention": 2, "addmm": 6}),
        ("selective", {"native_layer_norm": 8, "gelu": 4, "_softmax": 1}),
    ],
)
def test_what_the_backward_pass_computes_again(tiny, drawn, images, checkpointing, again):
    spec, found = tiny(layers=4), Counter()
    loss = drawn(spec, checkpointing=checkpointing)(images(spec)).sum()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.overloadpacket.__name__
            if "backward" not in name:
                found["attention" if "attention" in name else name] += 1
            return op(*args, **(kwargs or {}))

    with Count():
        loss.backward()
    named = ("native_layer_norm", "gelu", "attention", "_softmax", "addmm")
    assert {name: found[name] for name in named if found[name]} == again


@pytest.mark.parametrize("every", [0, 3])
def test_checkpointing_every_block_that_is_not_there_is_refused(tiny, every):
    with pytest.raises(InputError, match=f"activation_checkpointing: {every} .*this model has 2"):
        VisionTransformer(tiny(), checkpointing=every)


@pytest.mark.parametrize("checkpointing", ["none", pytest.param("full", marks=pytest.mark.long)])
def test_compiled_blocks_are_one_graph_and_the_same_function(tiny, drawn, images, checkpointing):
    torch._dynamo.reset()
    counters.clear()
    spec = tiny(layers=4)
    plain = gradients(drawn(spec), images(spec))
    model = drawn(spec, checkpointing=checkpointing, compiled=True)
    for found, truth in zip(gradients(model, images(spec)), plain, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.eval()(images(spec, 3)), drawn(spec)(images(spec, 3))), "evaluated as it is written"
    assert counters["stats"]["unique_graphs"] == 2, "the last block's, of the class token alone, and the others'"


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "full", 2, "selective"])
def test_compiled_and_checkpointed_dropout_is_drawn_alike_again(tiny, drawn, images, checkpointing):
    """Otherwise the gradient would be that of another function: against the slope along it."""
    torch._dynamo.reset()
    spec = tiny(dropout=0.3, representation_size=12)
    model = drawn(spec, checkpointing=checkpointing, compiled=True).double()

    def loss():
        torch.manual_seed(3)
        return model(images(spec, dtype=torch.float64)).square().sum()

    loss().backward()
    along = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(along[name], alpha=step)
        values.append(loss().item())
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx(sum(gradient.square().sum().item() for gradient in along.values()), rel=1e-6)


@pytest.mark.parametrize("fields", [{}, {"pool": "mean", "positions": "sincos2d"}])
def test_bf16_weights_and_bf16_autocast_stay_near_fp32(tiny, drawn, images, fields):
    spec = tiny(**fields)
    model, batch = drawn(spec), images(spec)
    logits = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(batch)
    model.bfloat16()
    for found in (autocast, model(batch), model(batch.bfloat16())):
        assert found.dtype == torch.bfloat16
        assert (found.float() - logits).abs().max() < 0.05 * logits.abs().max()
        assert found.float().ne(logits).any()


def test_a_network_that_was_never_filled_says_so_at_the_first_output(tiny, images):
    model = VisionTransformer(tiny())
    for unset in (model.class_token, model.position_embedding):
        nn.init.zeros_(unset)  # memory as it was found: may be anything
    assert model(images(tiny())).isnan().all()


def test_built_on_the_meta_device_and_materialised_it_is_the_network_built_directly(tiny):
    spec = tiny(representation_size=12)
    direct, late = VisionTransformer(spec), on_meta(spec).to_empty(device="cpu")
    initialize(direct, 11)
    initialize(late, 11)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name


def test_filling_a_network_on_the_meta_device_is_refused(tiny):
    for fill in (
        lambda model: initialize(model, 0),
        lambda model: load_tensors(model, {name: torch.zeros(s) for name, s in tensor_shapes(tiny()).items()}),
    ):
        with pytest.raises(RuntimeError, match="to_empty"):
            fill(on_meta(tiny()))


def test_loaded_tensors_are_the_networks_state_bit_for_bit_in_any_float_type(tiny, drawn):
    source = drawn(tiny(representation_size=12)).state_dict()
    model = VisionTransformer(tiny(representation_size=12))
    load_tensors(model, source)
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
    load_tensors(model.bfloat16(), source)
    assert all(torch.equal(tensor, source[name].bfloat16()) for name, tensor in model.state_dict().items())


def test_weights_of_another_model_are_refused_with_names_and_both_models(tiny, drawn):
    model = VisionTransformer(tiny(representation_size=12))
    source = drawn(tiny(layers=3, image_size=24)).state_dict()
    with pytest.raises(InputError) as refused:
        load_tensors(model, source, where="runs/a/checkpoints/step_00000010")
    message = str(refused.value)
    for part in (
        "runs/a/checkpoints/step_00000010: of another model",
        "Found: patch 8, 3 layers, width 32, mlp 64, 3 channels, 10 positions, 5 classes",
        "Wanted: patch 8, 2 layers, width 32, mlp 64, 16 px (grid 2x2), 3 channels, representation 12",
        "missing: representation.weight; representation.bias",
        "unexpected: blocks.2.norm1.weight; blocks.2.norm1.bias; blocks.2.attention.qkv.weight and 9 more",
        "mis-shaped: position_embedding [1, 10, 32], wanted [1, 5, 32]; head.weight [5, 32], wanted [5, 12]",
    ):
        assert part in message
    assert all(parameter.isnan().all() for parameter in model.head.parameters())


def test_tensors_are_loaded_into_partitioned_parameters_one_module_at_a_time(tiny, drawn, partitioned):
    source = drawn(tiny(representation_size=12)).state_dict()
    model = VisionTransformer(tiny(representation_size=12))
    names, (store, gathered) = [name for name, _ in model.named_parameters()], partitioned(model)
    load_tensors(model, source, gathered=gathered)
    assert all(torch.equal(source[name], store[name]) for name in names)


def test_tensors_that_are_no_vision_transformer_are_refused(tiny):
    with pytest.raises(InputError, match="1 tensors, none of them a Vision Transformer's"):
        load_tensors(VisionTransformer(tiny()), {"fc.weight": torch.zeros(2, 2)})
