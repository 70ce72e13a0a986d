"""A Vision Transformer of another kind is refused by what tells it apart, whichever library it comes from."""

import pytest
import torch

from pretrain.errors import InputError
from pretrain.weights.load import load_weights

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}
PLAIN = {"depth": 1, "img_size": 32}


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("vit_small_patch14_reg4_dinov2", SMALL, ["LayerScale", "register tokens"]),
        ("vit_small_patch16_dinov3", SMALL, ["LayerScale", "register tokens"]),
        ("deit3_small_patch16_224", SMALL, ["LayerScale"]),
        ("deit_tiny_distilled_patch16_224", SMALL, ["a distillation token"]),
        ("beit_base_patch16_224", SMALL, ["relative positions", "LayerScale", "queries and values alone"]),
        ("beit3_base_patch16_224", SMALL, ["norms inside attention or MLP"]),
        ("eva02_tiny_patch14_224", SMALL, ["pooling before the final norm"]),
        ("vit_base_patch16_rope_mixed_ape_224", SMALL, ["rotary positions"]),
        ("vit_relpos_base_patch16_224", SMALL, ["relative positions"]),
        ("vit_base_patch16_siglip_224", SMALL, ["attention pooling"]),
        ("vit_base_patch16_clip_quickgelu_224", SMALL, ["a norm before the blocks"]),
        ("aimv2_large_patch14_224", SMALL, ["a gated MLP"]),
        ("vit_small_patch16_18x2_224", SMALL, ["parallel branches"]),
        ("vit_tiny_patch16_224", {**PLAIN, "qk_norm": True}, ["norms of queries and keys"]),
        ("vit_tiny_patch16_224", {**PLAIN, "global_pool": "avg"}, ["pooling before the final norm"]),
        ("vit_giant_patch14_224", SMALL, ["does not say how many attention heads"]),
    ],
)
def test_of_timm(name, arguments, told, tmp_path):
    from timm import create_model

    torch.save(create_model(name, **arguments).state_dict(), tmp_path / "vit.pth")
    refused(tmp_path / "vit.pth", told)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("Dinov2", ["LayerScale", "a mask token"]),
        ("Dinov2WithRegisters", ["register tokens"]),
        ("DINOv3ViT", ["LayerScale", "register tokens"]),
        ("DeiT", ["a distillation token"]),
        ("CLIPVision", ["a norm before the blocks"]),
        ("SiglipVision", ["attention pooling"]),
        ("Beit", ["LayerScale"]),
        ("ViTMSN", ["model_type: found 'vit_msn'"]),  # whose tensors are those of a ViT
        ("IJepa", ["model_type: found 'ijepa'"]),
    ],
)
def test_of_transformers(kind, told, tmp_path):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=32, patch_size=16)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "vit")
    refused(tmp_path / "vit", told)


def test_masked_image_modelling_is_not_a_backbone_alone(tmp_path):
    from transformers import ViTConfig, ViTForMaskedImageModeling

    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    ViTForMaskedImageModeling(config).save_pretrained(tmp_path / "vit")
    refused(tmp_path / "vit", ["a mask token"])


def test_of_torchvision(tmp_path):
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    stem = [ConvStemConfig(8, 3, 2)] * 4
    model = VisionTransformer(32, 16, 1, 2, 32, 64, conv_stem_configs=stem)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    refused(tmp_path / "vit.pth", ["convolutions before it"])


def refused(path, told):
    with pytest.raises(InputError) as refusal:
        load_weights(path)
    assert str(path) in str(refusal.value)
    for words in told:
        assert words in str(refusal.value)
