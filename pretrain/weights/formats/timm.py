"""timm's VisionTransformer: safetensors that `timm.create_model("vit_…")` loads; its `.pth` files are read too."""

from __future__ import annotations

from typing import Any

from pretrain.model.spec import ViTSpec
from pretrain.weights.format import Format, blocks, heads_of, shape_of, square_grid
from pretrain.weights.table import Row, of_network
from pretrain.weights.tensorfile import TensorFile

EXAMPLE = """\
import timm
from safetensors.torch import load_file

model = timm.models.VisionTransformer(**card["arguments"]).eval()
model.load_state_dict(load_file(PATH))
tokens = model.forward_features(images)
outputs = {"logits": model(images), "cls": model.pool(tokens)}
"""


def _table(layers: int) -> list[Row]:
    rows = [
        Row("patch_embed.proj.weight", "patch_embedding.weight"),
        Row("patch_embed.proj.bias", "patch_embedding.bias"),
        Row("cls_token", "class_token"),
        Row("pos_embed", "position_embedding"),
        Row("norm.weight", "norm.weight"),
        Row("norm.bias", "norm.bias"),
        Row("head.weight", "head.weight"),
        Row("head.bias", "head.bias"),
    ]
    parts = {
        "norm1": "norm1",
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.out",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for block in range(layers):
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                rows.append(Row(f"blocks.{block}.{theirs}.{kind}", f"blocks.{block}.{ours}.{kind}"))
    return rows


def _prepared(file: TensorFile) -> TensorFile | None:
    return file if {"patch_embed.proj.weight", "blocks.0.attn.proj.weight"} <= file.shapes.keys() else None


def _spec(file: TensorFile) -> ViTSpec:
    width, channels, patch, _ = shape_of(file, "patch_embed.proj.weight", 4)
    layers, class_token = blocks(file, "blocks."), "cls_token" in file.shapes
    sizes = {"layers": layers, "width": width, "mlp": shape_of(file, "blocks.0.mlp.fc1.weight", 2)[0]}
    positions = shape_of(file, "pos_embed", 3)[1]
    return ViTSpec(
        patch_size=patch,
        layers=layers,
        width=width,
        mlp=sizes["mlp"],
        heads=heads_of(file, sizes),
        image_size=patch * square_grid(file, "pos_embed", positions, class_token),
        channels=channels,
        num_classes=file.shapes["head.weight"][0] if "head.weight" in file.shapes else 0,
        pool="cls" if class_token else "mean",
        qkv_bias="blocks.0.attn.qkv.bias" in file.shapes,
    )


def _lacks(spec: ViTSpec) -> dict[str, str]:
    if spec.representation_size is None:
        return {}
    return {"representation": "timm's network has no representation layer"}


def _arguments(spec: ViTSpec) -> dict[str, Any]:
    """What timm's network is made with."""
    return {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "in_chans": spec.channels,
        "num_classes": spec.num_classes,
        "embed_dim": spec.width,
        "depth": spec.layers,
        "num_heads": spec.heads,
        "mlp_ratio": spec.mlp / spec.width,
        "qkv_bias": spec.qkv_bias,
        "class_token": spec.pool == "cls",
        "global_pool": "token" if spec.pool == "cls" else "avg",
        "fc_norm": False,
        "act_layer": "gelu" if spec.gelu == "exact" else "gelu_tanh",
        "norm_layer": "layernorm",
    }


TIMM = Format(
    name="timm",
    library="timm",
    suffix=".safetensors",
    prepared=_prepared,
    spec=_spec,
    rows=lambda spec: of_network(_table(spec.layers), spec),
    lacks=_lacks,
    example=EXAMPLE,
    arguments=_arguments,
)
