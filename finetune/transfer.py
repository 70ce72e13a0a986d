"""A checkpoint's parameters into a task's network."""

from __future__ import annotations

from pathlib import Path

from finetune.head import describe_transfer, transfer
from pretrain.model.vit import VisionTransformer, load_tensors
from pretrain.run.experiment import Fill
from pretrain.weights.load import load_weights


def transferred(path: str | Path) -> Fill:
    """Fill a task's network from WEIGHTS: body as it is, positions resized, head zero; read when they are needed."""

    def fill(model: VisionTransformer) -> str:
        weights = load_weights(path)
        task = model.spec
        spec, tensors = transfer(
            weights.spec,
            weights.tensors,
            num_classes=task.num_classes,
            image_size=task.image_size,
            dropout=task.dropout,
            where=str(weights.source),
        )
        load_tensors(model, tensors, where=str(weights.source))
        return f"weights of {weights.source}\n{describe_transfer(weights.spec, spec)}"

    return fill
