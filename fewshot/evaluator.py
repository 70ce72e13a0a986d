"""The few-shot score of a network while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from fewshot.config import ProtocolSection
from fewshot.features import IMAGES, again, dtype_name, extract
from fewshot.score import fp64_device, score, summarise
from fewshot.store import FeatureSet
from fewshot.subject import representation
from fewshot.task import open_task
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.index.compare import unnamed_text
from pretrain.index.index import Index
from pretrain.ranks.collectives import World, broadcast_object, together
from pretrain.run.config import RunConfig
from pretrain.run.notes import trained_on
from pretrain.run.setup import check_index
from pretrain.stream.fault import Fault

_BATCH = ProtocolSection().batch  # that of launch/fewshot.py: another may change the last digits of features


class FewshotEvaluator:
    """The ridge probe of the `fewshot` section, on the representation (class token without one).

    Opens and checks the indices, and draws, once; that is collective. Only the drawn images of the support index are
    looked at. Raises InputError as `open_task` and `check_index` do, and where the config has no `fewshot` section.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        section = config.fewshot
        if section is None:
            raise InputError(f"config {config.name}: no fewshot section; set fewshot.every, .support, .query")
        self.every: int | None = section.every
        self._task = together(
            lambda: open_task(
                section.support, section.query, shots=section.shots, seeds=section.seeds, section="fewshot"
            )
        )
        self._l2, self._workers, self._world = section.l2, config.data.workers, world
        self._timeouts = config.data.timeouts()
        for split, index in (("support", self._task.support), ("query", self._task.query)):
            check_index(index, f"fewshot.{split}", world, self._timeouts)
        self._spec = config.model.spec()
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
        """("fewshot/5shot_ridge", accuracy), a pair for each shots, mean over the seeds; on every rank.

        The features are computed in the type of the network's weights, and so the score is that of `launch/fewshot.py`
        with `fewshot.dtype` set to it, for the same batch; unless it is float32, it ends the name:
        "fewshot/5shot_ridge_bfloat16".

        Collective, and done when it returns: a rank that does not iterate keeps no other waiting. NaN where
        the features are not finite. Under ZeRO `model` may be the partitioned network. An image that does not decode
        is seen as grey; ("fewshot/unreadable", how many) follows where there are any, of both sets, and
        ("fewshot/unlabelled", how many) where query images have no label and are not scored, and
        ("fewshot/in_support", how many) where query images are support images too.

        Raises InputError where a chunk cannot be read (StorageError: for now); the same on every rank.
        """
        return iter(broadcast_object(self._score(model)).items())

    def _score(self, model: nn.Module) -> dict[str, float]:
        task, layer = self._task, representation(self._spec)
        parts, grey = {}, 0
        for split, index, ids in (
            ("support", task.support, task.support_ids),
            ("query", task.query, task.query_ids),
        ):
            unreadable: list[Fault] = []
            parts[split] = extract(
                model,
                index,
                ids,
                layers=[layer],
                image_size=self._spec.image_size,
                channels=self._spec.channels,
                batch=_BATCH,
                workers=self._workers,
                world=self._world,
                timeouts=self._timeouts,
                doing=f"fewshot.{split}",
                unreadable=unreadable,
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
        arithmetic = "" if dtype is torch.float32 else f"_{dtype_name(dtype)}"
        names = {draw.shots: f"fewshot/{draw.shots}shot_ridge{arithmetic}" for draw in task.draws}
        besides = {"fewshot/unreadable": float(grey)} if grey else {}
        if unlabelled := task.query.samples - len(task.query_ids):
            besides["fewshot/unlabelled"] = float(unlabelled)
        if learned := again(query[IMAGES], support[IMAGES]):
            besides["fewshot/in_support"] = float(learned)
        if not (np.isfinite(support[layer]).all() and np.isfinite(query[layer]).all()):
            return dict.fromkeys(names.values(), math.nan) | besides
        results, _ = score(
            FeatureSet(task.support_ids, support[layer], query[layer]),
            task.draws,
            task.query_labels,
            classes=task.classes,
            probe_names=["ridge"],
            l2=self._l2,
            device=fp64_device(self._world.device),
        )
        return {names[row.shots]: row.mean for row in summarise(results)} | besides
