"""What Google's two dialects of `.npz` share. vit_jax wrote the paper's files, big_vision writes today's.

Sources: `vit_jax/checkpoint.py` and `vit_jax/models_vit.py` of google-research/vision_transformer; `models/vit.py` and
`utils.py` (`load_params`) of google-research/big_vision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import isqrt
from typing import Any

from torch import Tensor

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.weights.formats.format import blocks, shape_of, square_grid
from pretrain.weights.formats.table import Row, of_network, third
from pretrain.weights.formats.timm import TIMM
from pretrain.weights.tensorfile import TensorFile

_BLOCKS = "Transformer/encoderblock"
# Where positions have been kept over the years.
_POSITIONS = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding")
# Where the network may be in a file, in the order in which big_vision's loader looks, and what lies beside it there
# that is no part of a network.
_BESIDE = {"params/": ("opt", "chrono"), "opt/target/": ("opt/state", "extra", "chrono"), "": ()}
_BESIDE_TOWER = ("txt", "t", "b")  # text tower, temperature and bias beside the image tower `img`
_MOST_LAYERS = 10_000  # in a stack; a file of a few MB could announce millions
_SINCOS_SIZE = 224  # pixels; a file without positions does not say


@dataclass(frozen=True)
class Dialect:
    """How one of the two names things.

    Args:
        prefix: before every name, in files that are written.
        attention, norm2, mlp: the modules of a block. vit_jax numbers all of them together, big_vision by class.
        positions: the tensor of learned positions.
        class_slot: whether the class token has a position of its own.
    """

    prefix: str
    attention: str
    norm2: str
    mlp: str
    positions: str
    class_slot: bool


VIT_JAX = Dialect(
    prefix="",
    attention="MultiHeadDotProductAttention_1",
    norm2="LayerNorm_2",
    mlp="MlpBlock_3",
    positions="Transformer/posembed_input/pos_embedding",
    class_slot=True,
)
BIG_VISION = Dialect(
    prefix="params/",  # by which timm tells this dialect
    attention="MultiHeadDotProductAttention_0",
    norm2="LayerNorm_1",
    mlp="MlpBlock_0",
    positions="pos_embedding",
    class_slot=False,
)


def rows(dialect: Dialect, spec: ViTSpec) -> list[Row]:
    """The table of a network."""
    part = (1, 1, spec.grid**2) if spec.pool == "cls" and not dialect.class_slot else None
    each = [_block(dialect, spec.width, block) for block in range(spec.layers)]
    found = [
        Row("embedding/kernel", "patch_embedding.weight", "d c y x -> y x c d"),
        Row("embedding/bias", "patch_embedding.bias"),
        Row("cls", "class_token"),
        Row(dialect.positions, "position_embedding", part=part),
        # The same tensor of every block in turn, so that a stack of them is read once.
        *(row for same in zip(*each, strict=True) for row in same),
        *_norm("Transformer/encoder_norm", "norm"),
        *_dense("pre_logits", "representation"),
        *_dense("head", "head"),
    ]
    return of_network([replace(row, name=dialect.prefix + row.name) for row in found], spec)


def _block(dialect: Dialect, width: int, number: int) -> list[Row]:
    theirs, ours = f"{_BLOCKS}_{number}", f"blocks.{number}"
    attention = f"{theirs}/{dialect.attention}"
    found = _norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
    for place, name in enumerate(("query", "key", "value")):
        part = third(width, place)
        found.append(Row(f"{attention}/{name}/kernel", f"{ours}.attention.qkv.weight", "(h e) d -> d h e", part))
        found.append(Row(f"{attention}/{name}/bias", f"{ours}.attention.qkv.bias", "(h e) -> h e", part))
    return [
        *found,
        Row(f"{attention}/out/kernel", f"{ours}.attention.out.weight", "d (h e) -> h e d"),
        Row(f"{attention}/out/bias", f"{ours}.attention.out.bias"),
        *_norm(f"{theirs}/{dialect.norm2}", f"{ours}.norm2"),
        *_dense(f"{theirs}/{dialect.mlp}/Dense_0", f"{ours}.mlp.fc1"),
        *_dense(f"{theirs}/{dialect.mlp}/Dense_1", f"{ours}.mlp.fc2"),
    ]


def _norm(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}/scale", f"{ours}.weight"), Row(f"{theirs}/bias", f"{ours}.bias")]


def _dense(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}/kernel", f"{ours}.weight", "o i -> i o"), Row(f"{theirs}/bias", f"{ours}.bias")]


def _network(file: TensorFile) -> TensorFile | None:
    """The network in a file of Google's, its names without prefix and its blocks apart; None: a file of another kind.

    What is left out on purpose is told in the remarks among the notes.

    Raises:
        InputError: unknown tensors beside the network, or stacks of different numbers of blocks.
    """
    anchors = ("embedding/kernel", "Transformer/encoder_norm/scale")
    places = [(root, tower) for root in _BESIDE for tower in ("", "img/")]
    for root, tower in places:
        if any(f"{root}{tower}{anchor}" in file.shapes for anchor in anchors):
            break
    else:
        return None
    beside = [*_BESIDE[root], *(root + name for name in (_BESIDE_TOWER if tower else ()))]
    known = {name: group for name in file.shapes for group in beside if name == group or name.startswith(f"{group}/")}
    if unknown := [name for name in file.shapes if name not in known and not name.startswith(root + tower)]:
        raise InputError(
            f"weights {file.where}: beside the network under {root + tower}, left over: {', '.join(unknown)}"
        )
    left_out = [f"{list(known.values()).count(group)} under {group}" for group in beside if group in known.values()]
    names = {name.removeprefix(root + tower): name for name in file.shapes if name not in known}
    found = _unstacked(file.renamed(names))
    if left_out:
        found = _remarked(found, f"tensors left out, as they are no part of the network: {', '.join(left_out)}")
    return found


def _remarked(file: TensorFile, remark: str) -> TensorFile:
    return replace(file, notes={**file.notes, "remarks": [*file.notes.get("remarks", ()), remark]})


def _unstacked(file: TensorFile) -> TensorFile:
    """Blocks that were scanned lie in one stack, the layers first: the same tensors, block by block."""
    stacks = {name: shape for name, shape in file.shapes.items() if name.startswith(f"{_BLOCKS}/")}
    if not stacks:
        return file
    layers = {shape[:1] for shape in stacks.values()}
    if len(layers) > 1 or () in layers:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in stacks.items())
        raise InputError(f"weights {file.where}: stacked blocks whose first axes, the layers, differ: {told}")
    (count,) = layers.pop()
    if count > _MOST_LAYERS:
        raise InputError(f"weights {file.where}: stacks of {count:,} blocks; no Vision Transformer has so many")
    of_block = {
        f"{_BLOCKS}_{number}{name.removeprefix(_BLOCKS)}": (name, number) for name in stacks for number in range(count)
    }
    if twice := sorted(of_block.keys() & file.shapes.keys()):
        raise InputError(f"weights {file.where}: blocks both stacked and apart: {', '.join(twice)}")
    stack = lru_cache(maxsize=1)(file.values)

    def values(name: str) -> Tensor:
        if name not in of_block:
            return file.values(name)
        whole, number = of_block[name]
        return stack(whole)[number]

    shapes = {name: shape for name, shape in file.shapes.items() if name not in stacks}
    shapes |= {name: stacks[whole][1:] for name, (whole, _) in of_block.items()}
    return TensorFile(file.where, shapes, values, file.notes)


def _positions(file: TensorFile) -> tuple[str, int]:
    """Name and number of the learned positions of a network; an empty name where it has none."""
    name = next((name for name in _POSITIONS if name in file.shapes), "")
    return name, shape_of(file, name, 3)[1] if name else 0


def _has_class_slot(positions: int) -> bool:
    """Whether there is one position more than in a square grid; then they are no square grid themselves."""
    return positions > 1 and isqrt(positions - 1) ** 2 == positions - 1


def prepared(dialect: Dialect, file: TensorFile) -> TensorFile | None:
    """The network in a file, named as `dialect` does; None where the file is not Google's or is of the other dialect.

    As big_vision's loader does it, both ways to number modules go with all the ways to keep positions: a file is of the
    dialect whose positions it has.

    Raises:
        InputError: as `_network`, or two names are of one tensor.
    """
    found = _network(file)
    if found is None:
        return None
    by_class = any(f"/{BIG_VISION.attention}/" in name for name in found.shapes)
    positions, count = _positions(found)
    fixed = not positions and by_class
    grid_alone = positions not in ("", VIT_JAX.positions) and not _has_class_slot(count)
    if dialect is not (BIG_VISION if fixed or grid_alone else VIT_JAX):
        return None
    if fixed:
        size = f"{_SINCOS_SIZE} pixels, which it does not say"
        found = _remarked(
            found, f"holds no positions: taken for a network of fixed sine-cosine ones and images of {size}"
        )
    own = BIG_VISION if by_class else VIT_JAX
    modules = {getattr(own, part): getattr(dialect, part) for part in ("attention", "norm2", "mlp")}
    names: dict[str, str] = {}
    for name in found.shapes:
        new = dialect.positions if name in _POSITIONS else name
        if new.startswith(f"{_BLOCKS}_"):
            new = "/".join(modules.get(part, part) for part in new.split("/"))
        if (twin := names.setdefault(dialect.prefix + new, name)) != name:
            raise InputError(f"weights {file.where}: {twin} and {name} are the same tensor; one of them would be right")
    return found.renamed(names)


def spec(dialect: Dialect, file: TensorFile) -> ViTSpec:
    """The network of a file whose names are those of `dialect`; what no shape tells is as in the authors' code."""
    name = partial("{}{}".format, dialect.prefix)
    patch, _, channels, width = shape_of(file, name("embedding/kernel"), 4)
    block = name(f"{_BLOCKS}_0")
    positions = name(dialect.positions)
    class_token = name("cls") in file.shapes
    sizes: dict[str, Any] = {"image_size": _SINCOS_SIZE, "positions": "sincos2d"}
    # big_vision's networks that average the patches may have fixed positions.
    if positions in file.shapes or class_token or dialect.class_slot:
        count = shape_of(file, positions, 3)[1]
        class_token = class_token or (dialect.class_slot and _has_class_slot(count))  # then `cls` is missing
        sizes = {"image_size": patch * square_grid(file, positions, count, class_token and dialect.class_slot)}
    representation, head = name("pre_logits/kernel"), name("head/kernel")
    try:
        return ViTSpec(
            patch_size=patch,
            layers=blocks(file, f"{name(_BLOCKS)}_"),
            width=width,
            mlp=shape_of(file, f"{block}/{dialect.mlp}/Dense_0/kernel", 2)[1],
            heads=shape_of(file, f"{block}/{dialect.attention}/query/kernel", 3)[1],
            channels=channels,
            num_classes=shape_of(file, head, 2)[1] if head in file.shapes else 0,
            representation_size=shape_of(file, representation, 2)[1] if representation in file.shapes else None,
            gelu="tanh",
            pool="cls" if class_token else "mean",
            **sizes,
        )
    except InputError as error:
        where = f"weights {file.where}"
        raise error if str(error).startswith(where) else InputError(f"{where}: {error}") from None


def lacks(spec: ViTSpec) -> dict[str, str]:
    """What the authors' code computes in one way only."""
    found = {}
    if spec.gelu != "tanh":
        found["gelu"] = "the authors' code computes GELU's tanh form, these weights were trained with the exact one"
    if spec.norm_eps != 1e-6:
        found["norm_eps"] = f"the authors' norms have epsilon 1e-6, these {spec.norm_eps:g}"
    if not spec.qkv_bias:
        found["qkv_bias"] = "the authors' queries, keys and values have biases"
    return found


def arguments(dialect: Dialect, spec: ViTSpec) -> dict[str, Any]:
    """What timm's network is made with, so that it gives the features before the representation layer and the head."""
    slots = {} if dialect.class_slot else {"no_embed_class": True}
    return {**TIMM.arguments(spec), "num_classes": 0, "act_layer": "gelu_tanh", **slots}


def example(dialect: Dialect) -> str:
    """The example of a format, as `Format` describes it."""
    return _EXAMPLE.replace("PREFIX", dialect.prefix)


_EXAMPLE = """\
import numpy as np
import timm
import torch

# The file is for the authors' JAX code. timm reads it too, but for the layers after the pooled features.
model = timm.models.VisionTransformer(**card["arguments"]).eval()
model.load_pretrained(PATH)
arrays = {name: torch.from_numpy(array) for name, array in np.load(PATH).items()}
features = model(images)
outputs = {"cls": features}
if "PREFIXpre_logits/kernel" in arrays:
    features = torch.tanh(features @ arrays["PREFIXpre_logits/kernel"] + arrays["PREFIXpre_logits/bias"])
    outputs["tanh"] = features
if "PREFIXhead/kernel" in arrays:
    outputs["logits"] = features @ arrays["PREFIXhead/kernel"] + arrays["PREFIXhead/bias"]
"""
