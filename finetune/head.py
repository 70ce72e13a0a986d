"""From a pre-training checkpoint to a task: a new linear head, another resolution."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pretrain.model.positions import resize_to
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer, check_tensors, load_tensors, tensor_shapes
from pretrain.weights.weights import Weights

# What belongs to the pre-training task and is left behind.
DROPPED = ("representation.", "head.")


def transfer(
    spec: ViTSpec,
    tensors: Mapping[str, Tensor],
    *,
    num_classes: int,
    image_size: int,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    where: str = "weights",
) -> tuple[ViTSpec, dict[str, Tensor]]:
    """The spec and tensors to fine-tune from: paper, section 3.2.

    Drops the representation and the classification layer, attaches one linear layer [num_classes, d] of
    zeros (weight and bias), and resizes learned positions to the grid of `image_size` pixels (in fp64). All
    other tensors are handed on as they are, uncopied. `where` says in messages where the tensors came from.

    Raises InputError where `tensors` is not a model of `spec` (the dropped layers may be absent).
    """
    shapes = {name: shape for name, shape in tensor_shapes(spec).items() if not name.startswith(DROPPED)}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(DROPPED)}
    check_tensors(kept, shapes, spec.describe(), where=where)

    task = replace(spec, num_classes=num_classes, image_size=image_size, dropout=dropout, drop_path=drop_path)
    new = replace(task, representation_size=None)
    kept = resize_to(new, kept)
    dtype = kept["patch_embedding.weight"].dtype
    kept["head.weight"] = torch.zeros(num_classes, spec.width, dtype=dtype)
    kept["head.bias"] = torch.zeros(num_classes, dtype=dtype)
    return new, kept


def describe_transfer(old: ViTSpec, new: ViTSpec) -> str:
    """One line that says what `transfer` dropped, attached and resized."""
    representation = [f"representation layer ({old.representation_size})"] if old.representation_size else []
    dropped = [*representation, *([f"head of {old.num_classes} classes"] if old.num_classes else [])]
    head = f"dropped: {' and '.join(dropped) or 'nothing'}; new: head of {new.num_classes}, zeros"
    kind = "positions" if old.positions == "learned" else "fixed positions"
    grid = f"{old.grid}x{old.grid} → {new.grid}x{new.grid} ({old.image_size} → {new.image_size} px)"
    ignored = new.image_size % new.patch_size
    return f"{head}; {kind} {grid}" + (f", {ignored} px ignored" if ignored else "")


def load_transferred(model: VisionTransformer, weights: Weights) -> str:
    """Give a task's network the weights of another: body as it is, positions resized, head zero; says so."""
    task = model.spec
    spec, tensors = transfer(
        weights.spec,
        weights.tensors,
        num_classes=task.num_classes,
        image_size=task.image_size,
        dropout=task.dropout,
        drop_path=task.drop_path,
        where=str(weights.source),
    )
    load_tensors(model, tensors, where=str(weights.source))
    return describe_transfer(weights.spec, spec)
