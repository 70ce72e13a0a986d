"""Evaluation while training: what an evaluator is, and validation, the one every run has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.console import say
from pretrain.engine.fragments import averaged
from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages, to_float
from pretrain.index.index import Index
from pretrain.ranks.collectives import World, all_gather_list, all_reduce_sum
from pretrain.stream.fault import Fault, first_fault
from pretrain.stream.loader import LoaderOptions, evaluation_batches
from pretrain.stream.section import DataSection
from pretrain.training.loss import Loss


class Evaluator(Protocol):
    """Something that measures the network while it trains. `launch` hands them to the trainer."""

    every: int | None  # steps between runs; None: after the last step only
    scores: tuple[str, ...]  # names of the values that every run yields

    def run(self, model: torch.nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """The named values after `step` steps. All ranks call it; what rank 0 yields is logged.

        Every rank must call `model` equally often: before each batch the ranks agree whether to continue, and the call
        raises if they do not.
        """
        ...


class _Left(Exception):
    """The ranks have agreed to stop during an evaluation."""


def evaluate(
    evaluators: Sequence[Evaluator], engine: Any, step: int, before_batch: Callable[[], bool]
) -> dict[str, float] | None:
    """Run `evaluators` on the engine's network after `step` steps, in evaluation mode. Collective.

    Where an average of the weights is kept they run on it too; its values are named averaged/….

    Args:
        before_batch: called before each batch on every rank; False, the same on all, ends the evaluation.

    Returns:
        the values by name; None where the evaluation was ended.
    """
    engine.eval()

    def go_on(*_: Any) -> None:
        if not before_batch():
            raise _Left

    # The first of all hooks: under ZeRO 3 the others begin to gather parameters.
    hook = engine.module.register_forward_pre_hook(go_on, prepend=True)
    try:
        with torch.no_grad():
            values = _run_all(evaluators, engine.module, step)
            if engine.basic_optimizer.averages:
                with averaged(engine):
                    on_average = _run_all(evaluators, engine.module, step)
                values |= {f"averaged/{name}": value for name, value in on_average.items()}
    except _Left:
        return None
    finally:
        hook.remove()
    return values


def _run_all(evaluators: Sequence[Evaluator], model: torch.nn.Module, step: int) -> dict[str, float]:
    return {name: value for evaluator in evaluators for name, value in evaluator.run(model, step)}


def due(evaluators: Sequence[Evaluator], done: int, *, last: bool) -> list[Evaluator]:
    """Those to run after `done` steps: all after the `last`."""
    return [evaluator for evaluator in evaluators if last or (evaluator.every and done % evaluator.every == 0)]


def check_best(name: str, evaluators: Sequence[Evaluator], *, averages: bool) -> None:
    """Refuse a `checkpoint.best` that is no score of the evaluators. `averages`: whether they run on an average too.

    Raises:
        InputError: it names those that there are.
    """
    scores = [score for evaluator in evaluators for score in evaluator.scores]
    scores += [f"averaged/{score}" for score in scores if averages]
    if name not in scores:
        offered = f"one of {', '.join(scores)}" if scores else "data.eval or fewshot, so that there is one, or null"
        raise InputError(f"checkpoint.best: {name!r} is no score of this run's evaluations; set {offered}")


class Validation:
    """Loss, top-1 and top-5 accuracy over a labelled set, every sample once, on however many ranks.

    With label lists a prediction is right if the class is one of the sample's labels, and top-5 if one of the five is.
    Samples without a label (an empty list) are in neither accuracy nor loss, as in ReaL's evaluator; they are counted.
    """

    def __init__(
        self,
        index: Index,
        loss: Loss | None,
        world: World,
        data: DataSection,
        transform: EvalImages,
        *,
        batch: int,
        dtype: torch.dtype,
        every: int | None,
        ids: NDArray[np.int64] | None = None,
    ) -> None:
        """
        Args:
            loss: None where it is not defined for the set's labels; then the accuracies stand alone.
            batch: images per rank and forward pass.
            ids: the samples of the index that are held out of training, to be scored alone; None: all.

        Raises:
            InputError: no sample has a label.
        """
        self.every = every
        self.scores = (*(("eval/loss",) if loss else ()), "eval/top1", "eval/top5")
        self._index, self._loss, self._world, self._data = index, loss, world, data
        self._transform, self._batch, self._dtype, self._ids = transform, batch, dtype, ids
        self._key = "data.eval" if ids is None else "data.held_out"
        self._samples = index.samples if ids is None else len(ids)
        self._unlabelled = index.unlabelled if ids is None else int((index.labels(ids) < 0).all(axis=1).sum())
        if self._unlabelled == self._samples:
            raise InputError(
                f"{self._key}: none of the {self._samples:,} images has a label, so there is nothing to score; "
                + ("set an index with labels, or null" if ids is None else "hold out a larger share")
            )
        if self._unlabelled and world.main:
            say(
                f"{self._key}: {self._unlabelled:,} of {self._samples:,} images have no label and are left out of loss "
                "and accuracy"
            )

    def run(self, model: torch.nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """("eval/loss", …) where it is defined, ("eval/top1", …), ("eval/top5", …), accuracies in [0, 1].

        Where there are any, ("eval/unreadable", …) and ("eval/unlabelled", …) follow: how many images.
        """
        world = self._world
        sums = torch.zeros(5, dtype=torch.float64, device=world.device)  # loss, top-1, top-5, images scored, readable
        batches = evaluation_batches(
            self._index,
            self._transform,
            LoaderOptions(
                world.rank,
                world.size,
                self._data.workers,
                unreadable_chunks="stop",
                pin=world.device.type != "cpu",
                timeouts=self._data.timeouts(),
            ),
            batch=self._batch,
            ids=self._ids,
        )
        faults: list[Fault] = []
        with batches:
            for batch in batches:
                faults += batch.faults
                batch = batch.to(world.device)
                labels, valid = batch.labels, batch.valid
                scored = valid & (labels >= 0).any(dim=1)
                logits = model(to_float(batch.images, self._dtype)).float()
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices
                right = (best[:, :, None] == labels[:, None, :]).any(dim=2) & scored[:, None]
                sums += torch.stack(
                    [
                        self._loss(logits, labels, scored) * len(logits) if self._loss else scored.new_zeros(()),
                        right[:, 0].sum(),
                        right.any(dim=1).sum(),
                        scored.sum(),
                        valid.sum(),
                    ]
                )
        loss, top1, top5, images, readable = all_reduce_sum(sums).tolist()
        if unreadable := self._samples - readable:
            self._report(faults)
        # An unreadable image counts as a miss: the set's size does not depend on its faults.
        labelled = self._samples - self._unlabelled
        if self._loss:
            yield "eval/loss", loss / max(images, 1)
        yield "eval/top1", top1 / labelled
        yield "eval/top5", top5 / labelled
        if unreadable:
            yield "eval/unreadable", unreadable
        if self._unlabelled:
            yield "eval/unlabelled", float(self._unlabelled)

    def _report(self, faults: list[Fault]) -> None:
        """Refuse unreadable chunks on all ranks; name the first of the unreadable images. Collective."""
        broken = all_gather_list([fault for fault in faults if fault.of_chunk])
        if broken:
            raise first_fault(broken).error(f"{self._key}: ")
        first = all_gather_list([fault.describe(self._index) for fault in faults])[0]
        if self._world.main:
            say(f"{self._key}: {first}; grey, and counted as a miss")
