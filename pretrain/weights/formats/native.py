"""This project's own format: safetensors with the parameters' own names, and the network's sizes in the metadata."""

from __future__ import annotations

from pretrain.model.spec import ViTSpec
from pretrain.model.vit import tensor_shapes
from pretrain.weights.formats.format import Format, description
from pretrain.weights.formats.table import Row
from pretrain.weights.tensorfile import TensorFile

EXAMPLE = """\
import pretrain

outputs = {"logits": (model := pretrain.load_weights(PATH).model())(images), **model(images, features=True)}
"""


def _prepared(file: TensorFile) -> TensorFile | None:
    return file if description(file).get("format") == NATIVE.name else None


def _spec(file: TensorFile) -> ViTSpec:
    return ViTSpec.recorded(description(file)["model"])


def _rows(spec: ViTSpec) -> list[Row]:
    return [Row(name, name) for name in tensor_shapes(spec)]


NATIVE = Format(
    name="safetensors",
    library="vit-foundry",
    suffix=".safetensors",
    prepared=_prepared,
    spec=_spec,
    rows=_rows,
    lacks=lambda spec: {},
    example=EXAMPLE,
    learned_positions=False,
    pixels_as_here=True,
)
