"""Hugging Face's ViT: a folder that `transformers` loads as ViTForImageClassification or, without a head, as ViTModel.

Written with the tensors' names of transformers up to 5.8, which later versions read too. Read with either: from 5.9 on
`vit.encoder.layer.0.attention.attention.query` is `vit.layers.0.attention.q_proj`, and so on; the prefix `vit.` may be
missing. ViTModel's pooler, a dense layer and tanh, is the representation layer.

The preprocessor written beside it gives the pixels of this project's evaluation where the margin that is cropped is
even (224 px). Where it is odd (384 px), the library's centre may lie a pixel further to the top left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pretrain.errors import InputError
from pretrain.model.spec import Gelu, ViTSpec
from pretrain.weights.formats.format import Format, description
from pretrain.weights.formats.table import Row, of_network, third
from pretrain.weights.tensorfile import TensorFile

EXAMPLE = """\
from transformers import ViTForImageClassification, ViTModel

pooled = card["model"]["representation_size"] is not None
model = ViTModel.from_pretrained(PATH, add_pooling_layer=pooled).eval()
found = model(images)
outputs = {"cls": found.last_hidden_state[:, 0]}
if pooled:
    outputs["tanh"] = found.pooler_output
if card["model"]["num_classes"]:
    outputs["logits"] = ViTForImageClassification.from_pretrained(PATH).eval()(images).logits
"""

_PARTS = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attention.out",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_LATER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BACKBONE = ("embeddings.", "encoder.", "layers.", "layernorm.", "pooler.")  # what may lack the prefix
# What a config.json that leaves it out means.
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "pooler_act": "tanh",
}
_GELUS: dict[str, Gelu] = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


def _rows(spec: ViTSpec) -> list[Row]:
    modules = {"vit.embeddings.patch_embeddings.projection": "patch_embedding"}
    rows = [
        Row("vit.embeddings.cls_token", "class_token"),
        Row("vit.embeddings.position_embeddings", "position_embedding"),
    ]
    for block in range(spec.layers):
        layer = f"vit.encoder.layer.{block}"
        modules |= {f"{layer}.{theirs}": f"blocks.{block}.{ours}" for theirs, ours in _PARTS.items()}
        for number, name in enumerate(("query", "key", "value")):
            for kind in ("weight", "bias"):
                theirs, ours = f"{layer}.attention.attention.{name}.{kind}", f"blocks.{block}.attention.qkv.{kind}"
                rows.append(Row(theirs, ours, part=third(spec.width, number)))
    modules |= {"vit.layernorm": "norm", "vit.pooler.dense": "representation", "classifier": "head"}
    for theirs, ours in modules.items():
        rows += [Row(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]
    return of_network(rows, spec)


def _prepared(file: TensorFile) -> TensorFile | None:
    config = file.notes.get("config")
    names: dict[str, list[str]] = {}
    for name in file.shapes:
        names.setdefault(_written_name(name), []).append(name)
    of_library = config is not None and "model_type" in config
    if not of_library and "vit.embeddings.patch_embeddings.projection.weight" not in names:
        return None
    if config is None:
        raise InputError(
            f"weights {file.where}: Hugging Face's tensors without their config.json, which says the heads, the "
            "activation and ε; give the folder that holds both config.json and model.safetensors"
        )
    if config.get("model_type") != "vit":
        raise _wrong(file, "model_type", config.get("model_type"), '"vit"')
    if double := [" and ".join(group) for group in names.values() if len(group) > 1]:
        raise InputError(f"weights {file.where}: the same tensor twice: {', '.join(double)}")
    prepared = file.renamed({new: old for new, (old,) in names.items()})
    if said := description(file):
        told, exported = _spec(prepared), replace(ViTSpec.recorded(said["model"]), dropout=0.0, drop_path=0.0)
        if told != exported:
            raise InputError(
                f"weights {file.where}: config.json and the tensors' names say {told}, but {exported} was exported; "
                "one of the two files was changed"
            )
    return prepared


def _written_name(name: str) -> str:
    """The name that is written, of a tensor of either generation, with or without the prefix."""
    bare = name.removeprefix("vit.")
    if not bare.startswith(_BACKBONE):
        return name
    if bare.startswith("layers."):
        number, _, rest = bare.removeprefix("layers.").partition(".")
        module, _, kind = rest.rpartition(".")
        bare = f"encoder.layer.{number}.{_LATER.get(module, module)}.{kind}"
    return f"vit.{bare}"


def _spec(file: TensorFile) -> ViTSpec:
    said = {**_DEFAULTS, **file.notes["config"]}
    pooler, classifier = (file.shapes.get(f"{name}.weight") for name in ("vit.pooler.dense", "classifier"))
    if pooler and classifier:
        raise InputError(
            f"weights {file.where}: has both a pooler and a classifier, of which Hugging Face's classifier uses only "
            "its own; save a ViTForImageClassification without the pooler, or a ViTModel"
        )
    if "ViTForImageClassification" in str(said.get("architectures")) and not classifier:
        raise InputError(
            f"weights {file.where}: config.json says ViTForImageClassification, but there is no tensor "
            "classifier.weight"
        )
    gelu = _GELUS.get(str(said["hidden_act"]))
    if gelu is None:
        raise _wrong(file, "hidden_act", said["hidden_act"], "one of " + ", ".join(_GELUS))
    if pooler and said["pooler_act"] != "tanh":
        raise _wrong(file, "pooler_act", said["pooler_act"], '"tanh"')
    try:
        return ViTSpec(
            patch_size=_side(file, "patch_size", said),
            layers=said["num_hidden_layers"],
            width=said["hidden_size"],
            mlp=said["intermediate_size"],
            heads=said["num_attention_heads"],
            image_size=_side(file, "image_size", said),
            channels=said["num_channels"],
            num_classes=classifier[0] if classifier else 0,
            representation_size=pooler[0] if pooler else None,
            gelu=gelu,
            norm_eps=said["layer_norm_eps"],
            qkv_bias=said["qkv_bias"],
        )
    except InputError as error:
        raise InputError(f"weights {file.where}: config.json: {error}") from None


def _side(file: TensorFile, key: str, said: dict[str, Any]) -> int:
    """The side of a square, which may be given as two equal ones."""
    sides = said[key] if isinstance(said[key], list) else [said[key]]
    if len(sides) not in (1, 2) or sides[0] != sides[-1]:
        raise _wrong(file, key, said[key], "one side in pixels: only squares are read")
    side: int = sides[0]
    return side


def _wrong(file: TensorFile, key: str, found: object, right: str) -> InputError:
    return InputError(f"weights {file.where}: config.json: {key}: found {found!r}; it must be {right}")


def _lacks(spec: ViTSpec) -> dict[str, str]:
    lacking = {}
    if spec.pool == "mean":
        lacking["pool"] = "Hugging Face's ViT classifies a class token, never the mean of the patches"
    if spec.representation_size and spec.num_classes:
        lacking["head"] = (
            "Hugging Face's classifier skips the pooler, which is the representation layer; without the head the "
            "folder is a ViTModel with its pooler"
        )
    return lacking


def _companions(spec: ViTSpec, whole: bool) -> dict[str, Any]:
    labels = [f"LABEL_{number}" for number in range(spec.num_classes)]
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if spec.num_classes else "ViTModel"],
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.mlp,
        "hidden_act": "gelu" if spec.gelu == "exact" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": spec.norm_eps,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_channels": spec.channels,
        "qkv_bias": spec.qkv_bias,
        "encoder_stride": spec.patch_size,
        "pooler_output_size": spec.representation_size or spec.width,
        "pooler_act": "tanh",
    }
    if labels:
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: number for number, label in enumerate(labels)}
    size = spec.image_size
    preprocessor = {
        "image_processor_type": "BitImageProcessor",  # unlike ViT's own, it crops
        "do_convert_rgb": spec.channels == 3,
        "do_resize": True,
        "size": {"height": size, "width": size} if whole else {"shortest_edge": round(size * 8 / 7)},
        "resample": 2,  # bilinear
        "do_center_crop": not whole,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * spec.channels,
        "image_std": [0.5] * spec.channels,
    }
    return {"config.json": config, "preprocessor_config.json": preprocessor}


HF = Format(
    name="hf",
    library="transformers",
    suffix="",
    prepared=_prepared,
    spec=_spec,
    rows=_rows,
    lacks=_lacks,
    example=EXAMPLE,
    companions=_companions,
)
