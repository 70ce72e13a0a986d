"""What a network says of images: every image once, on all ranks, in order of id on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.evaluation.config import EvaluateConfig
from finetune.evaluation.scores import TOP, Predictions
from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages, to_float
from pretrain.index.index import Index
from pretrain.model.arithmetic import exact_float32
from pretrain.progress import Progress
from pretrain.ranks.collectives import World, all_gather_list, any_rank, gather_object
from pretrain.stream.fault import Fault, first_fault
from pretrain.stream.loader import Batch, LoaderOptions, evaluation_batches
from pretrain.training.loss import multi_hot

Kind = Literal["softmax", "sigmoid"]


def predict(
    model: nn.Module, index: Index, images: EvalImages, kind: Kind, config: EvaluateConfig, world: World, *, doing: str
) -> Predictions | None:
    """What `model` says of every image of `index`, on rank 0; else None. Collective.

    Batches are cut by id, and the last ones are padded, so each image is computed in the same row of the same batch on
    any number of ranks: results are equal bit for bit where processors and threads per rank are. Another batch size, or
    another number of threads, may change the last digits. Under fp32, products are computed in fp32, with no TF32.

    Args:
        model: in evaluation mode; it computes in the type of its weights.
        doing: begins every message.

    Raises:
        InputError: a chunk cannot be read (StorageError: for now), or logits are not finite; the same on every rank.
    """
    dtype = next(model.parameters()).dtype
    options = LoaderOptions(
        world.rank,
        world.size,
        config.data.workers,
        unreadable_chunks="stop",
        pin=world.device.type != "cpu",
        timeouts=config.data.timeouts(),
    )
    found: list[Predictions] = []
    before = 0
    with (
        evaluation_batches(index, images, options, batch=config.evaluate.batch) as batches,
        torch.no_grad(),
        exact_float32(),
        Progress(doing, "images", index.samples if world.main else 0) as progress,
    ):
        for batch in batches:
            _refuse_chunks(batch.faults, index, world, doing)
            on_device = batch.to(world.device)
            logits = model(to_float(on_device.images, dtype)).float()
            finite = bool((logits.isfinite().all(dim=1) | ~on_device.valid).all())
            if any(any_rank(world.device, not finite)):
                raise InputError(f"{doing}: logits are not finite; these weights have diverged, or overflow in {dtype}")
            found.append(_of_batch(logits, on_device, kind, several=index.longest > 1))
            done = min(len(found) * config.evaluate.batch * world.size, index.samples)
            progress.advance(done - before)
            before = done
    parts = gather_object(Predictions.joined(found))
    return Predictions.joined(parts) if parts else None


def _of_batch(logits: Tensor, batch: Batch, kind: Kind, several: bool) -> Predictions:
    """The predictions of a batch, without the rows that pad it."""
    best = logits.topk(min(TOP, logits.shape[1]), dim=1)  # as validation finds them, ties included
    if kind == "softmax":
        probabilities = (best.values - logits.logsumexp(dim=1, keepdim=True)).exp()
    else:
        probabilities = best.values.sigmoid()
    real = batch.ids >= 0
    return Predictions(
        batch.ids[real],
        tuple(key for key, taken in zip(batch.keys, real, strict=True) if taken),
        best.indices.cpu().numpy()[real],
        probabilities.cpu().numpy()[real],
        image_losses(logits, batch.labels, kind, several).cpu().numpy()[real],
        batch.valid.cpu().numpy()[real],
    )


def image_losses(logits: Tensor, labels: Tensor, kind: Kind, several: bool) -> Tensor:
    """Each image's loss without label smoothing: logits [b, k], labels [b, l] padded with −1 → [b].

    Softmax has none for `several` labels an image: NaN; nor has an image without a label, whose value means nothing.
    """
    if kind == "sigmoid":
        targets = multi_hot(labels, logits.shape[1])
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
    if several:
        return torch.full_like(logits[:, 0], torch.nan)
    return F.cross_entropy(logits, labels[:, 0], reduction="none", ignore_index=-1)


def _refuse_chunks(faults: Sequence[Fault], index: Index, world: World, doing: str) -> None:
    """Refuse a chunk that cannot be read, on all ranks; an image that does not decode is counted. Collective."""
    broken = [fault for fault in faults if fault.of_chunk]
    if any(any_rank(world.device, bool(broken))):
        gathered = all_gather_list([replace(fault, reason=fault.describe(index)) for fault in broken])
        raise first_fault(gathered).error(f"{doing}: ")
