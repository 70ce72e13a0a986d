"""What a format of weights is: its table, how its files are told, and which networks it holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pretrain.errors import InputError
from pretrain.model.spec import ARCHITECTURES, ViTSpec
from pretrain.weights.formats.table import Row
from pretrain.weights.tensorfile import TensorFile

DESCRIPTION = "vit_foundry"  # the entry of a file's metadata that describes the network


@dataclass(frozen=True)
class Format:
    """A format of weights.

    Args:
        name: as `--format` takes it.
        library: whose networks read it, for people.
        suffix: of its files; empty for a folder.
        prepared: a file with the names of the table where it is one of this format, else None.
        spec: the network of a prepared file, told from its shapes and notes.
        rows: the table for a network. It may name parameters that the network does not have: they are left out.
        lacks: what a network has and the format, or the library's network, cannot hold: "representation", "head",
            "gelu", or a field of ViTSpec → the reason, a phrase.
        example: Python that loads the file PATH into the library's network and sets `outputs`, a dict of tensors or
            arrays, from `images`; it may read `card`, the export's description. Runs in `export.py --check` and stands
            in the export's README; a format without one is only read. Its outputs are among "logits" and the features
            that the network gives by name.
        pixels_as_here: whether its networks take x / 127.5 − 1; else only a file beside the weights may tell.
        learned_positions: whether fixed positions must be written as if they were learned.
        fitted: the tensors of the same network as the format holds them, where two of them become one, say.
        companions: further JSON files of a folder, by name, for a network, and whether it is evaluated on whole images.
        arguments: keywords that the example gives to the library's network, kept in the card as "arguments".
    """

    name: str
    library: str
    suffix: str
    prepared: Callable[[TensorFile], TensorFile | None]
    spec: Callable[[TensorFile], ViTSpec]
    rows: Callable[[ViTSpec], list[Row]]
    lacks: Callable[[ViTSpec], dict[str, str]] = field(default=lambda spec: {})
    example: str = ""
    learned_positions: bool = True
    pixels_as_here: bool = False
    fitted: Callable[[ViTSpec, dict[str, Tensor]], dict[str, Tensor]] = field(default=lambda spec, tensors: tensors)
    companions: Callable[[ViTSpec, bool], dict[str, Any]] = field(default=lambda spec, whole: {})
    arguments: Callable[[ViTSpec], dict[str, Any]] = field(default=lambda spec: {})


def description(file: TensorFile) -> dict[str, Any]:
    """What an export of this project says of itself in its metadata; empty for any other file.

    Raises:
        InputError: the description is damaged.
    """
    text = file.notes.get(DESCRIPTION)
    if text is None:
        return {}
    try:
        found: dict[str, Any] = json.loads(text)
        ViTSpec.recorded(found["model"])
        if not isinstance(found["format"], str):
            raise TypeError(f"format {found['format']!r}")
        config = found.get("config", {})
        if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
            raise TypeError(f"config {config!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"weights {file.where}: its description is damaged: {error!r}") from None
    return found


def blocks(file: TensorFile, prefix: str) -> int:
    """How many blocks there are: names are `prefix`0…, `prefix`1…, with no number left out.

    Raises:
        InputError: a number is missing.
    """
    numbers = set()
    for name in file.shapes:
        number = name.removeprefix(prefix).replace("/", ".").partition(".")[0]
        if name.startswith(prefix) and re.fullmatch("[0-9]{1,9}", number):
            numbers.add(int(number))
    if numbers != set(range(len(numbers))):
        gap = next(number for number in range(len(numbers)) if number not in numbers)
        raise InputError(f"weights {file.where}: has no block {gap}: no tensor begins with {prefix}{gap}")
    return len(numbers)


def shape_of(file: TensorFile, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor without which a network cannot be told.

    Raises:
        InputError: there is none of that name, or it has another number of axes.
    """
    if name not in file.shapes:
        raise InputError(f"weights {file.where}: has no tensor {name}")
    shape = file.shapes[name]
    if len(shape) != axes:
        raise InputError(f"weights {file.where}: {name} has shape {list(shape)}; {axes} axes were expected")
    return shape


def heads_of(file: TensorFile, sizes: Mapping[str, int]) -> int:
    """The number of heads, which no shape tells, of a network whose other sizes are those of a named architecture.

    Raises:
        InputError: there is none of these sizes.
    """
    wanted = {name: sizes[name] for name in ("layers", "width", "mlp")}
    for known in ARCHITECTURES.values():
        if {name: known[name] for name in wanted} == wanted:
            return known["heads"]
    raise InputError(
        f"weights {file.where}: does not say how many attention heads its network has, and one of "
        f"{wanted['layers']} layers, width {wanted['width']} and mlp {wanted['mlp']} is none of "
        f"{' '.join(ARCHITECTURES)}; give weights in a format that says so: safetensors, npz, big_vision or hf"
    )


def square_grid(file: TensorFile, name: str, positions: int, class_slot: bool) -> int:
    """The side of a grid of learned positions, the class token's slot left out.

    Raises:
        InputError: the grid is not square.
    """
    side = round((positions - class_slot) ** 0.5)
    if side < 1 or side**2 != positions - class_slot:
        kind = "one class slot and a square grid" if class_slot else "a square grid"
        raise InputError(f"weights {file.where}: {name} holds {positions} positions, which are not {kind}")
    return side
