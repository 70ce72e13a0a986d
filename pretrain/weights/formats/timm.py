"""timm's VisionTransformer: safetensors with the names of `timm.create_model("vit_…")`; `.pth` and `.bin` are read too.

Read also: files of timm 0.4 with a representation layer, and positions without a slot for the class token
(`no_embed_class`). Files say nothing of heads, activation and ε: heads are those of the named architecture of these
sizes, the activation is exact GELU and ε 1e-6, as in timm's own `vit_…` and `deit_…`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.weights.formats.format import Format, blocks, heads_of, shape_of, square_grid
from pretrain.weights.formats.table import Row, of_network
from pretrain.weights.tensorfile import TensorFile

EXAMPLE = """\
import torch
from functools import partial
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

norm = partial(torch.nn.LayerNorm, eps=card["model"]["norm_eps"])
model = VisionTransformer(**card["arguments"], norm_layer=norm).eval()
model.load_state_dict(load_file(PATH))
tokens = model.forward_features(images)
outputs = {"cls": model.forward_head(tokens, pre_logits=True)}
if model.num_classes:
    outputs["logits"] = model(images)
"""

# Of timm's architectures, those that are this network, whatever the tag of their weights.
_ARCHITECTURES = re.compile(r"(vit|deit)_[a-z]+_patch\d+_(gap_)?\d+(_in21k|_miil)?(\..*)?")
_PARTS = {
    "norm1": "norm1",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _rows(spec: ViTSpec) -> list[Row]:
    modules = {"patch_embed.proj": "patch_embedding"}
    for block in range(spec.layers):
        modules |= {f"blocks.{block}.{theirs}": f"blocks.{block}.{ours}" for theirs, ours in _PARTS.items()}
    modules |= {"norm": "norm", "pre_logits.fc": "representation", "head": "head"}
    rows = [Row("cls_token", "class_token"), Row("pos_embed", "position_embedding")]
    for theirs, ours in modules.items():
        rows += [Row(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]
    return of_network(rows, spec)


def _prepared(file: TensorFile) -> TensorFile | None:
    if not {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} & file.shapes.keys():
        return None
    _check_config(file)
    positions = file.shapes.get("pos_embed", ())
    count = positions[1] if len(positions) == 3 else 0
    # With a class slot there is one more than a square, and no number is a square and one more than a square.
    if "cls_token" not in file.shapes or not count or round(count**0.5) ** 2 != count:
        return file

    def values(name: str) -> Tensor:
        tensor = file.values(name)
        return F.pad(tensor, (0, 0, 1, 0)) if name == "pos_embed" else tensor

    return replace(file, shapes={**file.shapes, "pos_embed": (1, count + 1, positions[2])}, values=values)


# Arguments that the tensors' shapes tell as well, or that make no difference outside training.
_ARGUMENTS = {"img_size", "patch_size", "in_chans", "num_classes", "dynamic_img_size", "global_pool"}
_ARGUMENTS |= {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}


def _check_config(file: TensorFile) -> None:
    """Raises InputError where a folder's `config.json`, as timm writes it, is of another network."""
    config = file.notes.get("config", {})
    architecture = config.get("architecture")
    if architecture is not None and not _ARCHITECTURES.fullmatch(str(architecture)):
        raise InputError(
            f"weights {file.where}: config.json: timm's {architecture} is of another kind, or unknown here; known are "
            "vit_SIZE_patchP_N, vit_SIZE_patchP_gap_N and deit_SIZE_patchP_N"
        )
    given = config.get("model_args") or {}
    if not isinstance(given, dict):
        raise InputError(f"weights {file.where}: config.json: model_args: an object was expected, found {given!r}")
    wanted = "token" if "cls_token" in file.shapes else "avg"
    for pool in (config.get("global_pool"), given.get("global_pool")):
        if pool not in (None, wanted):
            raise InputError(
                f"weights {file.where}: config.json: global_pool is {pool!r}; only {wanted!r} is this network"
            )
    if odd := sorted(given.keys() - _ARGUMENTS):
        raise InputError(f"weights {file.where}: config.json: model_args has {', '.join(odd)}, which is not known here")


def _spec(file: TensorFile) -> ViTSpec:
    width, channels, patch, _ = shape_of(file, "patch_embed.proj.weight", 4)
    class_token, positions = "cls_token" in file.shapes, shape_of(file, "pos_embed", 3)[1]
    sizes = {"layers": blocks(file, "blocks."), "width": width, "mlp": shape_of(file, "blocks.0.mlp.fc1.weight", 2)[0]}
    return ViTSpec(
        patch_size=patch,
        layers=sizes["layers"],
        width=width,
        mlp=sizes["mlp"],
        heads=heads_of(file, sizes),
        image_size=patch * square_grid(file, "pos_embed", positions, class_token),
        channels=channels,
        num_classes=shape_of(file, "head.weight", 2)[0] if "head.weight" in file.shapes else 0,
        representation_size=(
            shape_of(file, "pre_logits.fc.weight", 2)[0] if "pre_logits.fc.weight" in file.shapes else None
        ),
        pool="cls" if class_token else "mean",
        qkv_bias="blocks.0.attn.qkv.bias" in file.shapes,
    )


def _lacks(spec: ViTSpec) -> dict[str, str]:
    if spec.representation_size is None:
        return {}
    return {"representation": "timm's network has no representation layer"}


def _arguments(spec: ViTSpec) -> dict[str, Any]:
    """What timm's network is made with."""
    ratio = spec.mlp / spec.width
    if int(spec.width * ratio) != spec.mlp:  # how timm gets the MLP's width, and rounding may cost one
        ratio = (spec.mlp + 0.5) / spec.width
    return {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "in_chans": spec.channels,
        "num_classes": spec.num_classes,
        "embed_dim": spec.width,
        "depth": spec.layers,
        "num_heads": spec.heads,
        "mlp_ratio": ratio,
        "qkv_bias": spec.qkv_bias,
        "class_token": spec.pool == "cls",
        "global_pool": "token" if spec.pool == "cls" else "avg",
        "fc_norm": False,  # the mean of the normed patches, not the normed mean
        "act_layer": "gelu" if spec.gelu == "exact" else "gelu_tanh",
    }


TIMM = Format(
    name="timm",
    library="timm",
    suffix=".safetensors",
    prepared=_prepared,
    spec=_spec,
    rows=_rows,
    lacks=_lacks,
    example=EXAMPLE,
    arguments=_arguments,
)
