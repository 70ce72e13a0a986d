"""The same weights and images give the same logits and gradients as other implementations of the network."""

import pytest
import torch

from pretrain.model.spec import ViTSpec, spec_from_arch
from pretrain.model.vit import VisionTransformer, load_tensors

SIZES = {
    "whole patches": ViTSpec(8, 3, 64, 128, 4, image_size=32, num_classes=10),
    "pixels ignored": ViTSpec(7, 2, 32, 96, 2, image_size=40, num_classes=3),
    "one patch, one head": ViTSpec(16, 1, 16, 16, 1, image_size=16, num_classes=4),
    "Ti/16": spec_from_arch("vit_ti_16", num_classes=21),
}


def reference_network(reference, spec, dtype):
    """The reference in the spec's size, every parameter moved away from zero."""
    torch.manual_seed(5)
    network = reference.VisionTransformer(
        spec.image_size,
        spec.patch_size,
        spec.layers,
        spec.width,
        spec.mlp,
        spec.heads,
        representation_size=spec.representation_size,
        drop_p=spec.dropout,
        num_classes=spec.num_classes,
    ).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def renamed(reference_tensors):
    """The reference's tensors under our names, q, k and v stacked."""
    found, names = {}, {"input_embedding": "patch_embedding", "encoder.ln": "norm"}
    names |= {"head": "head", "head.0": "representation", "head.2": "head"}
    parts = {"self_atten_LN": "norm1", "self_atten.fc_o": "attention.out", "FF_LN": "norm2"}
    parts |= {"FF.linear.0": "mlp.fc1", "FF.linear.3": "mlp.fc2"}
    for name, tensor in reference_tensors.items():
        module, _, kind = name.rpartition(".")
        if name in ("class_token", "encoder.pos_embedding"):
            ours = "class_token" if name == "class_token" else "position_embedding"
            found[ours] = tensor.reshape(1, -1, tensor.shape[-1])
        elif module in names:
            found[f"{names[module]}.{kind}"] = tensor
        else:
            _, _, i, part = module.split(".", 3)
            if part == "self_atten.fc_q":
                stack = [reference_tensors[f"{module[:-1]}{letter}.{kind}"] for letter in "qkv"]
                found[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(stack)
            elif part in parts:
                found[f"blocks.{i}.{parts[part]}.{kind}"] = tensor
    return found


def outputs_and_gradients(network, batch, *, ours):
    torch.manual_seed(9)  # dropout masks
    if ours and network.training:  # of every token in the last block too, as the reference draws them
        features = network(batch, features=True)
        logits = network.head(features.get("tanh", features["cls"]))
    else:
        logits = network(batch)
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"logits": logits.detach(), **(gradients if ours else renamed(gradients))}


def worst_error(found, wanted):
    """Largest difference, as a share of the largest value of its tensor, and the tensor's name."""
    assert found.keys() == wanted.keys()
    return max((float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max()), n) for n in wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["eval", "same dropout masks"])
@pytest.mark.parametrize("representation", [None, 24])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_logits_and_gradients_equal_the_reference(reference, images, size, representation, dropout, dtype, tolerance):
    fields = {**vars(SIZES[size]), "representation_size": representation, "dropout": dropout}
    spec = ViTSpec(**fields)
    theirs = reference_network(reference, spec, dtype)
    ours = VisionTransformer(spec).to(dtype)
    load_tensors(ours, renamed(dict(theirs.state_dict())))
    batch = images(spec, 2, dtype)
    for network in (ours, theirs):
        network.train(dropout > 0)
    found = outputs_and_gradients(ours, batch, ours=True)
    wanted = outputs_and_gradients(theirs, batch, ours=False)
    error, tensor = worst_error(found, wanted)
    assert error < tolerance, tensor


def test_head_dimension_of_h14_equals_the_reference(reference, images):
    spec = ViTSpec(14, 2, 160, 320, 2, image_size=44, num_classes=10, representation_size=160)
    theirs = reference_network(reference, spec, torch.float32)
    ours = VisionTransformer(spec)
    load_tensors(ours, renamed(dict(theirs.state_dict())))
    found = outputs_and_gradients(ours, images(spec), ours=True)
    error, tensor = worst_error(found, outputs_and_gradients(theirs, images(spec), ours=False))
    assert error < 1e-5, tensor


def test_logits_equal_torchvisions(tiny, drawn, images):
    from torchvision.models.vision_transformer import VisionTransformer as Torchvision

    spec = tiny(layers=3, image_size=32, representation_size=12)
    model = drawn(spec).eval()
    theirs = Torchvision(
        32, 8, spec.layers, spec.heads, spec.width, spec.mlp, num_classes=5, representation_size=12
    ).eval()
    blocks = {"norm1": "ln_1", "attention.out": "self_attention.out_proj", "norm2": "ln_2"}
    blocks |= {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
    names = {"patch_embedding": "conv_proj", "norm": "encoder.ln", "head": "heads.head"}
    names |= {"representation": "heads.pre_logits"}
    state = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if name.startswith("blocks."):
            _, i, part = module.split(".", 2)
            layer = f"encoder.layers.encoder_layer_{i}"
            qkv = f"{layer}.self_attention.in_proj_{kind}"
            state[qkv if part == "attention.qkv" else f"{layer}.{blocks[part]}.{kind}"] = tensor
        else:
            alone = {"class_token": "class_token", "position_embedding": "encoder.pos_embedding"}
            state[alone[name] if name in alone else f"{names[module]}.{kind}"] = tensor
    theirs.load_state_dict(state)
    torch.testing.assert_close(model(images(spec)), theirs(images(spec)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_logits_equal_timms(tiny, drawn, images, pool, gelu):
    timm = pytest.importorskip("timm.models.vision_transformer")
    spec = tiny(layers=3, image_size=32, pool=pool, gelu=gelu)
    model = drawn(spec).eval()
    pooling = {"global_pool": "token"}
    if pool == "mean":
        pooling = {"global_pool": "avg", "class_token": False, "fc_norm": False}
    theirs = timm.VisionTransformer(
        img_size=32,
        patch_size=8,
        num_classes=5,
        embed_dim=spec.width,
        depth=spec.layers,
        num_heads=spec.heads,
        mlp_ratio=spec.mlp / spec.width,
        act_layer="gelu_tanh" if gelu == "tanh" else "gelu",
        **pooling,
    ).eval()
    names = {"patch_embedding": "patch_embed.proj", "class_token": "cls_token"}
    names |= {"position_embedding": "pos_embed", "attention.qkv": "attn.qkv", "attention.out": "attn.proj"}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        state[name] = tensor
    theirs.load_state_dict(state)
    torch.testing.assert_close(model(images(spec)), theirs(images(spec)), rtol=0, atol=1e-5)
