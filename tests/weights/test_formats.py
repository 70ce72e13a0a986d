"""What is special of a format: its variants that are read, what it cannot hold, and what its files must say."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.errors import InputError
from pretrain.images.decode import from_pillow
from pretrain.images.transforms import EvalImages, to_float
from pretrain.model.spec import spec_from_arch
from pretrain.weights.export import check, export
from pretrain.weights.load import choose, load_weights
from pretrain.weights.read import FORMATS

TINY = {"img_size": 32, "num_classes": 5}  # of timm's vit_tiny_patch16_224
SIZES = {"patch_size": 4, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def randomised(model, scale=0.1):
    """Large enough for attention to be far from uniform, which would hide swapped queries and keys."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def timm(**arguments):
    from timm import create_model

    return randomised(create_model("vit_tiny_patch16_224", **{**TINY, **arguments}))


def transformers(kind="ViTForImageClassification", **config):
    import transformers as library

    config = library.ViTConfig(**{**SIZES, "image_size": 12, "num_labels": 5, **config})
    return randomised(getattr(library, kind)(config), scale=0.4)


def same(ours, theirs, size):
    images = torch.rand(2, 3, size, size) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


@pytest.fixture
def exported(run_folder, tmp_path, network):
    def make(name, drop=(), **changes):
        out = tmp_path / f"vit{FORMATS[name].suffix}"
        export(choose(run_folder(tmp_path / "run", network(**changes))), FORMATS[name], out, drop=drop)
        return out

    return make


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("timm", {"norm_eps": 0.1, "qkv_bias": False, "channels": 1, "image_size": 13}),
        ("timm", {"gelu": "tanh", "pool": "mean", "positions": "sincos2d", "mlp": 37}),
        ("timm", {"num_classes": 0}),
        ("torchvision", {"norm_eps": 0.1, "representation_size": 8}),
        ("torchvision", {"num_classes": 0}),
        ("torchvision", {"num_classes": 0, "representation_size": 8}),
        ("hf", {"norm_eps": 0.1, "qkv_bias": False, "channels": 1, "image_size": 13, "gelu": "tanh"}),
        ("hf", {"num_classes": 0, "dropout": 0.1, "drop_path": 0.1}),
        ("hf", {"num_classes": 0, "representation_size": 8, "positions": "sincos2d"}),
    ],
)
def test_options_of_a_network_are_the_librarys_too(name, changes, exported):
    """With a large ε and random tensors, an option that is lost changes every output."""
    found, not_asked = check(exported(name, **changes))
    assert not_asked == ""
    asked = {one.output for one in found if one.reader == FORMATS[name].library}
    assert asked == ({"cls"} | ({"logits"} if changes.get("num_classes") != 0 else set())) | (
        {"tanh"} if "representation_size" in changes else set()
    )
    assert max(one.difference for one in found) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("torchvision", {"pool": "mean"}, "pool: .* never the mean of the patches; another --format would do"),
        ("torchvision", {"gelu": "tanh"}, "gelu: .*exact GELU.*; --drop gelu, or another --format"),
        ("torchvision", {"channels": 1}, "channels: .* not of 1"),
        ("torchvision", {"image_size": 13}, "image_size: .*13 px are no multiple of 4"),
        ("torchvision", {"qkv_bias": False}, "qkv_bias: "),
        ("hf", {"pool": "mean"}, "pool: "),
        ("hf", {"representation_size": 8}, "head: .*skips the pooler.*; --drop head, or another"),
    ],
)
def test_what_a_library_cannot_hold_is_refused(name, changes, found, exported):
    with pytest.raises(InputError, match=found):
        exported(name, **changes)


def test_dropping_the_head_leaves_hugging_faces_pooler(exported):
    out = exported("hf", drop=("head",), representation_size=8)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["ViTModel"]
    assert load_weights(out).spec.representation_size == 8


# timm


def test_positions_without_a_slot_for_the_class_token(tmp_path):
    theirs = timm(no_embed_class=True, img_size=48)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    weights = load_weights(tmp_path / "vit.pth")
    assert weights.spec == spec_from_arch("vit_ti_16", image_size=48, num_classes=5)
    assert not weights.tensors["position_embedding"][:, 0].any()
    same(weights.model(), theirs, 48)


def test_features_without_biases_in_a_nested_bin(tmp_path):
    theirs = timm(num_classes=0, qkv_bias=False)
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "vit.bin")
    weights = load_weights(tmp_path / "vit.bin")
    assert weights.spec == spec_from_arch("vit_ti_16", image_size=32, num_classes=0, qkv_bias=False)
    same(weights.model(), theirs, 32)


def test_the_representation_layer_of_older_files(tmp_path):
    """timm 0.4 had one, a linear layer and tanh before the head."""
    theirs = timm(num_classes=0)
    layer, head = randomised(nn.Linear(192, 7)), randomised(nn.Linear(7, 5))
    older = {"pre_logits.fc": layer, "head": head}
    added = {f"{name}.{kind}": getattr(part, kind).data for name, part in older.items() for kind in ("weight", "bias")}
    torch.save({**theirs.state_dict(), **added}, tmp_path / "vit.pth")
    weights = load_weights(tmp_path / "vit.pth")
    assert weights.spec.representation_size == 7
    same(weights.model(), lambda images: head(torch.tanh(layer(theirs(images)))), 32)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"architecture": "vit_tiny_patch16_224", "global_pool": "token"}, None),
        ({"architecture": "vit_tiny_patch16_224.augreg_in21k", "model_args": {"img_size": 32}}, None),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"global_pool": "token", "drop_path_rate": 0.1}}, None),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"global_pool": "avg"}}, "global_pool is 'avg'; only"),
        ({"architecture": "vit_base_patch16_siglip_gap_224"}, "timm's vit_base_patch16_siglip_gap_224 is of another"),
        ({"architecture": "vit_tiny_patch16_224", "global_pool": "avg"}, "global_pool is 'avg'; only 'token'"),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"act_layer": "gelu_tanh"}},
            "model_args has act_layer",
        ),
    ],
)
def test_a_folder_of_the_hub_says_its_architecture(config, found, tmp_path):
    save_file(timm().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if found is None:
        assert load_weights(tmp_path).spec == spec_from_arch("vit_ti_16", image_size=32, num_classes=5)
    else:
        with pytest.raises(InputError, match=found):
            load_weights(tmp_path)


# torchvision


def test_the_mlps_older_names(tmp_path):
    from torchvision.models import VisionTransformer

    theirs = randomised(VisionTransformer(32, 16, 12, 3, 192, 768, num_classes=5))
    older = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): values
        for name, values in theirs.state_dict().items()
    }
    assert older.keys() != theirs.state_dict().keys()
    torch.save(older, tmp_path / "vit.pth")
    same(load_weights(tmp_path / "vit.pth").model(), theirs, 32)


# Hugging Face


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
@pytest.mark.parametrize("later", [False, True])
def test_both_generations_of_names_with_and_without_the_prefix(kind, later, tmp_path):
    """ViTModel's own files have no prefix."""
    theirs = transformers(kind, pooler_output_size=8, layer_norm_eps=1e-6)
    theirs.save_pretrained(tmp_path / "vit", save_original_format=not later)
    with safe_open(tmp_path / "vit/model.safetensors", "pt") as file:
        names = file.keys()
    assert any("encoder.layer.0" in name for name in names) != later
    weights = load_weights(tmp_path / "vit")
    assert weights.spec.norm_eps == 1e-6
    output = "logits" if kind == "ViTForImageClassification" else "pooler_output"
    same(weights.model(), lambda images: getattr(theirs(images), output), 12)


def test_a_folder_of_several_files(tmp_path):
    theirs = transformers()
    theirs.save_pretrained(tmp_path / "vit", max_shard_size="20KB")
    assert not (tmp_path / "vit/model.safetensors").exists()
    same(load_weights(tmp_path / "vit").model(), lambda images: theirs(images).logits, 12)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "dinov2"}, "model_type: found 'dinov2'; it must be \"vit\""),
        ({"hidden_act": "quick_gelu"}, "hidden_act: found 'quick_gelu'; it must be one of gelu, gelu_new"),
        ({"image_size": [12, 16]}, r"image_size: found \[12, 16\]; .*only squares"),
        ({"image_size": 16}, r"of another shape: vit.embeddings.position_embeddings \[1, 10, 16\], not \[1, 17, 16\]"),
        ({"num_attention_heads": 3}, "config.json: model.width: 16 does not divide"),
        ({"num_hidden_layers": 3}, "missing: .*vit.encoder.layer.2.layernorm_before.weight"),
        ({"num_hidden_layers": "2"}, "config.json: model.layers: found '2'"),
        ({"layer_norm_eps": 0}, "config.json: model.norm_eps: found 0"),
        ({"hidden_act": None}, "hidden_act: found None"),
        ({"hidden_act": []}, r"hidden_act: found \[\]"),
        ({"image_size": []}, r"image_size: found \[\]"),
    ],
)
def test_what_a_config_says_must_be_this_network(changes, found, tmp_path):
    transformers().save_pretrained(tmp_path / "vit")
    path = tmp_path / "vit/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=found) as refusal:
        load_weights(tmp_path / "vit")
    assert str(tmp_path / "vit") in str(refusal.value)


def test_another_pooler_is_refused(tmp_path):
    transformers("ViTModel", pooler_act="relu").save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="pooler_act: found 'relu'"):
        load_weights(tmp_path / "vit")


@pytest.mark.parametrize(("given", "tanh"), [("gelu_new", True), ("gelu_fast", True), ("gelu", False)])
def test_the_form_of_gelu_follows_the_config(given, tanh, tmp_path):
    theirs = transformers(hidden_act=given, image_size=[12, 12])
    theirs.save_pretrained(tmp_path / "vit")
    weights = load_weights(tmp_path / "vit")
    assert (weights.spec.gelu == "tanh") == tanh
    same(weights.model(), lambda images: theirs(images).logits, 12)


def test_tensors_without_their_config_are_refused(exported, tmp_path):
    transformers().save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match=r"without their config\.json"):
        load_weights(tmp_path / "vit/model.safetensors")
    (tmp_path / "vit/config.json").unlink()
    with pytest.raises(InputError, match=r"without their config\.json"):
        load_weights(tmp_path / "vit")


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"vit.pooler.dense.weight": (16, 16)}, "both a pooler and a classifier"),
        ({"embeddings.cls_token": (1, 1, 16)}, "the same tensor twice: .*embeddings.cls_token"),
        ({"decoder.weight": (16, 16)}, "left over: decoder.weight"),
    ],
)
def test_tensors_that_the_network_does_not_use_are_refused(extra, found, tmp_path):
    transformers().save_pretrained(tmp_path / "vit")
    path = tmp_path / "vit/model.safetensors"
    save_file({**load_file(path), **{name: torch.zeros(shape) for name, shape in extra.items()}}, path)
    with pytest.raises(InputError, match=found):
        load_weights(tmp_path / "vit")


def test_a_classifier_that_the_config_promises_must_be_there(tmp_path):
    transformers().save_pretrained(tmp_path / "vit")
    path = tmp_path / "vit/model.safetensors"
    save_file({name: values for name, values in load_file(path).items() if "classifier" not in name}, path)
    with pytest.raises(InputError, match=r"no tensor classifier\.weight"):
        load_weights(tmp_path / "vit")


def test_an_exports_config_cannot_be_changed_unnoticed(exported):
    path = exported("hf") / "config.json"
    path.write_text(path.read_text().replace('"gelu"', '"gelu_new"'))
    with pytest.raises(InputError, match="one of the two files was changed"):
        load_weights(path.parent)


@pytest.mark.parametrize(("size", "shift"), [(224, 0), (384, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_hugging_faces_preprocessing_gives_our_pixels(size, shift, channels, tmp_path):
    """All but a pixel at sizes whose margin is odd (55 of 439), half of which we round up, and they down."""
    from transformers import AutoImageProcessor

    spec = spec_from_arch("vit_b_16", image_size=size, channels=channels)
    for name, content in FORMATS["hf"].companions(spec, False).items():
        (tmp_path / name).write_text(json.dumps(content))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (size + 32, size + 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if channels == 3 else "L")
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = to_float(EvalImages(size, channels)(from_pillow(image, channels), 0, 0), torch.float32)
    assert theirs.shape == ours.shape
    kept = size - shift
    torch.testing.assert_close(theirs[:, shift:, shift:], ours[:, :kept, :kept], atol=1e-6, rtol=0)
