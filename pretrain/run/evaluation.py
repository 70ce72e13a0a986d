"""Evaluation while training: what an evaluator is, and validation, the one every run has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from pretrain.console import say
from pretrain.engine.fragments import averaged
from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages, to_float
from pretrain.index.index import Index
from pretrain.ranks.collectives import World, all_gather_list, all_reduce_sum, any_rank
from pretrain.ranks.stop import Stop
from pretrain.ranks.watchdog import Watchdog
from pretrain.record.meters import Meters
from pretrain.run.loss import Loss
from pretrain.storage.retry import Timeouts
from pretrain.stream.fault import Fault, first_cause
from pretrain.stream.loader import LoaderOptions, evaluation_batches


class Evaluator(Protocol):
    """Something that measures the network while it trains. `launch` hands them to the trainer."""

    every: int | None  # steps between runs; None: after the last step only

    def run(self, model: torch.nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """The named values after `step` steps. All ranks call it; what rank 0 yields is logged.

        Every rank calls `model` equally often: before each batch they agree whether to go on, and where they do not
        the call raises.
        """
        ...


class _Left(Exception):
    """The ranks have agreed to stop amid an evaluation."""


def evaluate(
    evaluators: Sequence[Evaluator],
    engine: Any,
    done: int,
    meters: Meters,
    watchdog: Watchdog,
    stop: Stop,
    world: World,
    *,
    last: bool,
) -> bool:
    """Run the evaluators that are due after `done` steps, on the engine's network in evaluation mode.

    Where an average of the weights is kept they run on it too; its values are named averaged/….

    Returns:
        whether it came to its end; False where a rank was asked to stop before, the same on every rank. Nothing is
        written down then, so that the evaluation is still to be made.
    """
    chosen = due(evaluators, done, last=last)
    if not chosen:
        return True
    watchdog.beat(done - 1, "evaluation")
    engine.eval()

    def before_batch(*_: Any) -> None:
        watchdog.beat(done - 1, "evaluation")  # however long a set is, each batch of it is progress
        if any(any_rank(world.device, stop.asked())):  # and a job's last minutes may be shorter than a set
            raise _Left

    # The first of all hooks: under ZeRO 3 the others begin to gather parameters.
    hook = engine.module.register_forward_pre_hook(before_batch, prepend=True)
    try:
        with torch.no_grad():
            values = {name: value for evaluator in chosen for name, value in evaluator.run(engine.module, done)}
            if engine.basic_optimizer.averages:
                with averaged(engine):
                    for evaluator in chosen:
                        values |= {f"averaged/{name}": value for name, value in evaluator.run(engine.module, done)}
    except _Left:
        return False
    finally:
        hook.remove()
    meters.evaluated(done, values)
    return True


def due(evaluators: Sequence[Evaluator], done: int, *, last: bool) -> list[Evaluator]:
    """Those to run after `done` steps: all after the `last`."""
    return [evaluator for evaluator in evaluators if last or (evaluator.every and done % evaluator.every == 0)]


class Validation:
    """Loss, top-1 and top-5 accuracy over a labelled set, every sample once, on however many ranks.

    whole: the whole images, squashed to the size, rather than their centres.
    With label lists a prediction is right if the class is one of the sample's labels, and top-5 if one of the five is.
    Samples without a label (an empty list) are in neither accuracy nor loss, as in ReaL's evaluator; they are counted.
    loss_of: None where the loss is not defined for the set's labels; then the accuracies stand alone.

    Raises InputError where no sample has a label.
    """

    def __init__(
        self,
        index: Index,
        loss_of: Loss | None,
        world: World,
        *,
        image_size: int,
        channels: int,
        whole: bool = False,
        batch: int,
        workers: int,
        timeouts: Timeouts | None = None,
        dtype: torch.dtype,
        every: int | None,
    ) -> None:
        self.every = every
        self._index, self._loss_of, self._world, self._dtype = index, loss_of, world, dtype
        self._transform = EvalImages(image_size, channels, whole)
        self._batch, self._workers, self._timeouts = batch, workers, timeouts
        self._unlabelled = index.unlabelled
        if self._unlabelled == index.samples:
            raise InputError(
                f"data.eval: none of the {index.samples:,} images has a label, so there is nothing to score; set an "
                "index with labels, or null"
            )
        if self._unlabelled and world.main:
            say(
                f"data.eval: {self._unlabelled:,} of {index.samples:,} images have no label and are left out of loss "
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
                self._workers,
                unreadable_chunks="stop",
                pin=world.device.type != "cpu",
                timeouts=self._timeouts,
            ),
            batch=self._batch,
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
                        self._loss_of(logits, labels, scored) * len(logits) if self._loss_of else scored.new_zeros(()),
                        right[:, 0].sum(),
                        right.any(dim=1).sum(),
                        scored.sum(),
                        valid.sum(),
                    ]
                )
        loss, top1, top5, images, readable = all_reduce_sum(sums).tolist()
        if unreadable := self._index.samples - readable:
            self._report(faults)
        # An unreadable image counts as a miss: the set's size does not depend on its faults.
        labelled = self._index.samples - self._unlabelled
        if self._loss_of:
            yield "eval/loss", loss / max(images, 1)
        yield "eval/top1", top1 / labelled
        yield "eval/top5", top5 / labelled
        if unreadable:
            yield "eval/unreadable", unreadable
        if self._unlabelled:
            yield "eval/unlabelled", float(self._unlabelled)

    def _report(self, faults: list[Fault]) -> None:
        """Refuse unreadable chunks on all ranks; name the first of the unreadable images. Collective."""
        broken = all_gather_list([fault.cause for fault in faults if fault.of_chunk])
        if broken:
            raise first_cause(broken).error("data.eval: ")
        first = all_gather_list([fault.describe(self._index) for fault in faults])[0]
        if self._world.main:
            say(f"data.eval: {first}; grey, and counted as a miss")
