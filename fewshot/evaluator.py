"""The few-shot score of a network while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from fewshot.cache import FeatureSet
from fewshot.config import ProtocolSection
from fewshot.features import IMAGES, Extraction, count_repeated, extract, representation
from fewshot.score import fp64_device, score, summarise
from fewshot.task import open_task
from pretrain.console import say
from pretrain.engine.engine import precision
from pretrain.errors import InputError
from pretrain.index.compare import unnamed_text
from pretrain.index.index import Index
from pretrain.model.arithmetic import dtype_name
from pretrain.ranks.collectives import World, broadcast_object, together
from pretrain.stream.fault import Fault
from pretrain.training.config import RunConfig
from pretrain.training.notes import trained_on
from pretrain.training.setup import check_index


class FewshotEvaluator:
    """The ridge probe of the `fewshot` section, on the representation (without one: the class token).

    Creating it opens and checks the indices, and draws the support sets; that is collective. Of the support index only
    the images drawn are read. Raises InputError as `open_task` and `check_index` do, and where the config has no
    `fewshot` section.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        section = config.fewshot
        if section is None:
            raise InputError(f"config {config.name}: no fewshot section; set fewshot.every, .support, .query")
        self.every: int | None = section.every
        dtype = precision(config.deepspeed)
        self.scores = tuple(_name(shots, dtype) for shots in section.shots)
        self._spec, self._world, self._timeouts = config.model.spec(), world, config.data.timeouts()
        # In all else as launch/fewshot.py: another batch may change the last digits of features.
        self._protocol = ProtocolSection(shots=section.shots, seeds=section.seeds, l2=section.l2, probes=("ridge",))
        self._how = Extraction(self._spec, self._protocol.batch, config.data.workers, world, self._timeouts)
        self._task = together(lambda: open_task(section.support, section.query, self._protocol, section="fewshot"))
        for split, (index, _) in self._task.splits.items():
            check_index(index, f"fewshot.{split}", world, self._timeouts)
        for note in together(lambda: self._notes(config.data.train) if world.main else []):
            say(f"note: {note}")

    def _notes(self, train: str | tuple[str, ...] | None) -> list[str]:
        task = self._task
        colours = task.colour_notes(self._spec.channels, self._timeouts, "fewshot")
        if train is None:
            return colours
        learned = Index.open(train)
        unnamed = unnamed_text([*learned.files, *task.support.files, *task.query.files])
        return [*colours, *filter(None, [unnamed]), *trained_on(learned, task.query, "fewshot.query")]

    def run(self, model: nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """Pairs ("fewshot/5shot_ridge", mean accuracy over the seeds), one for each number of shots; on every rank.

        The features are computed in the type of the network's weights. For the same batch the score is therefore that
        of `launch/fewshot.py` with this `fewshot.dtype`. A type other than float32 ends the name:
        "fewshot/5shot_ridge_bfloat16". The score is NaN where features are not finite.

        Counts follow where they are not 0: "fewshot/unreadable", images of both sets that do not decode and are
        computed as grey; "fewshot/unlabelled", query images without a label, which are not scored;
        "fewshot/in_support", query images that are support images too.

        Collective, and done when it returns: a rank that does not iterate keeps no other waiting. `model` may be
        partitioned (ZeRO-3).

        Raises InputError where a chunk cannot be read (StorageError: for now); the same on every rank.
        """
        return iter(broadcast_object(self._score(model)).items())

    def _score(self, model: nn.Module) -> dict[str, float]:
        task, layer = self._task, representation(self._spec)
        parts, grey = {}, 0
        for split, (index, ids) in task.splits.items():
            unreadable: list[Fault] = []
            parts[split] = extract(
                model, [layer], index, ids, self._how, doing=f"fewshot.{split}", unreadable=unreadable
            )
            grey += len(unreadable)
            if unreadable and self._world.main:
                say(
                    f"fewshot.{split}: {len(unreadable):,} of {len(ids):,} images cannot be read and are seen as grey, "
                    f"the first: {unreadable[0].describe(index)}"
                )
        support, query = parts["support"], parts["query"]
        if support is None or query is None:
            return {}
        dtype = next(model.parameters()).dtype
        names = {draw.shots: _name(draw.shots, dtype) for draw in task.draws}
        counts = {
            "fewshot/unreadable": grey,
            "fewshot/unlabelled": task.query.samples - len(task.query_ids),
            "fewshot/in_support": count_repeated(query[IMAGES], support[IMAGES]),
        }
        besides = {name: float(count) for name, count in counts.items() if count}
        features = FeatureSet(task.support_ids, support[layer.name], query[layer.name])
        if not (np.isfinite(features.support).all() and np.isfinite(features.query).all()):
            return dict.fromkeys(names.values(), math.nan) | besides
        device = fp64_device(self._world.device)
        scores = score(features, task.draws, task.query_labels, task.classes, self._protocol, device)
        return {names[row.shots]: row.mean for row in summarise(scores.results)} | besides


def _name(shots: int, dtype: torch.dtype) -> str:
    """Of the score at so many shots, computed in `dtype`."""
    return f"fewshot/{shots}shot_ridge" + ("" if dtype is torch.float32 else f"_{dtype_name(dtype)}")
