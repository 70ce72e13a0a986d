"""torchvision's VisionTransformer: safetensors with the names of `torchvision.models.vit_b_16`; `.pth` is read too.

Read also: the names before torchvision 0.12 (`mlp.linear_1`). Files say nothing of heads and ε: heads are those of the
named architecture of these sizes, and ε is 1e-6, as in torchvision's own.
"""

from __future__ import annotations

import re
from typing import Any

from pretrain.model.spec import ViTSpec
from pretrain.weights.formats.format import Format, blocks, heads_of, shape_of, square_grid
from pretrain.weights.formats.table import Row, of_network
from pretrain.weights.tensorfile import TensorFile

EXAMPLE = """\
import torch
from functools import partial
from safetensors.torch import load_file
from torchvision.models import VisionTransformer

norm = partial(torch.nn.LayerNorm, eps=card["model"]["norm_eps"])
model = VisionTransformer(**card["arguments"], norm_layer=norm).eval()
if not card["model"]["num_classes"]:
    del model.heads.head
model.load_state_dict(load_file(PATH))
outputs = {}
model.encoder.register_forward_hook(lambda module, given, tokens: outputs.update(cls=tokens[:, 0]))
if card["model"]["representation_size"]:
    model.heads.act.register_forward_hook(lambda module, given, values: outputs.update(tanh=values))
logits = model(images)
if card["model"]["num_classes"]:
    outputs["logits"] = logits
"""

_LAYER = "encoder.layers.encoder_layer_"
_PARTS = {
    "ln_1": "norm1",
    "self_attention.out_proj": "attention.out",
    "ln_2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}
_OLDER = {"mlp.linear_1": "mlp.0", "mlp.linear_2": "mlp.3"}


def _rows(spec: ViTSpec) -> list[Row]:
    modules = {"conv_proj": "patch_embedding"}
    rows = [Row("class_token", "class_token"), Row("encoder.pos_embedding", "position_embedding")]
    for block in range(spec.layers):
        modules |= {f"{_LAYER}{block}.{theirs}": f"blocks.{block}.{ours}" for theirs, ours in _PARTS.items()}
        for kind in ("weight", "bias"):
            rows.append(Row(f"{_LAYER}{block}.self_attention.in_proj_{kind}", f"blocks.{block}.attention.qkv.{kind}"))
    modules |= {"encoder.ln": "norm", "heads.pre_logits": "representation", "heads.head": "head"}
    for theirs, ours in modules.items():
        rows += [Row(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]
    return of_network(rows, spec)


def _prepared(file: TensorFile) -> TensorFile | None:
    if not any(name.startswith(_LAYER) for name in file.shapes):
        return None
    older = re.compile("|".join(map(re.escape, _OLDER)))
    return file.renamed({older.sub(lambda found: _OLDER[found[0]], name): name for name in file.shapes})


def _spec(file: TensorFile) -> ViTSpec:
    width, channels, patch, _ = shape_of(file, "conv_proj.weight", 4)
    positions = shape_of(file, "encoder.pos_embedding", 3)[1]
    sizes = {
        "layers": blocks(file, _LAYER),
        "width": width,
        "mlp": shape_of(file, f"{_LAYER}0.mlp.0.weight", 2)[0],
    }
    head, representation = "heads.head.weight", "heads.pre_logits.weight"
    return ViTSpec(
        patch_size=patch,
        layers=sizes["layers"],
        width=width,
        mlp=sizes["mlp"],
        heads=heads_of(file, sizes),
        image_size=patch * square_grid(file, "encoder.pos_embedding", positions, class_slot=True),
        channels=channels,
        num_classes=shape_of(file, head, 2)[0] if head in file.shapes else 0,
        representation_size=shape_of(file, representation, 2)[0] if representation in file.shapes else None,
    )


def _lacks(spec: ViTSpec) -> dict[str, str]:
    lacking = {}
    if spec.pool == "mean":
        lacking["pool"] = "torchvision's network classifies a class token, never the mean of the patches"
    if spec.gelu == "tanh":
        lacking["gelu"] = "torchvision's network has exact GELU, not its approximation by tanh"
    if spec.channels != 3:
        lacking["channels"] = f"torchvision's network takes images of 3 channels, not of {spec.channels}"
    if spec.image_size % spec.patch_size:
        lacking["image_size"] = (
            f"torchvision's network takes images of whole patches; {spec.image_size} px are no multiple of "
            f"{spec.patch_size}"
        )
    if not spec.qkv_bias:
        lacking["qkv_bias"] = "torchvision's network has biases of query, key and value"
    return lacking


def _arguments(spec: ViTSpec) -> dict[str, Any]:
    """What torchvision's network is made with."""
    return {
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_layers": spec.layers,
        "num_heads": spec.heads,
        "hidden_dim": spec.width,
        "mlp_dim": spec.mlp,
        "num_classes": spec.num_classes or 1,  # where there is none, the example takes this one out
        "representation_size": spec.representation_size,
    }


TORCHVISION = Format(
    name="torchvision",
    library="torchvision",
    suffix=".safetensors",
    prepared=_prepared,
    spec=_spec,
    rows=_rows,
    lacks=_lacks,
    example=EXAMPLE,
    arguments=_arguments,
)
