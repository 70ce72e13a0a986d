"""A few-shot evaluation from start to end: features by all ranks into files, then probes by one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fewshot.config import FewshotConfig, ProtocolSection
from fewshot.draw import Draw, draw_support
from fewshot.features import extract
from fewshot.score import Result, Scores, Sweep, score
from fewshot.store import Given, content, feature_file, kept, read_layer, write_features, write_times
from fewshot.subject import Entry, Subject, headline, subjects
from fewshot.task import Task
from pretrain.console import say
from pretrain.progress import Progress
from pretrain.ranks.collectives import World, on_main, together
from pretrain.run.setup import check_index
from pretrain.storage.retry import Timeouts

FEATURES = "features"  # folder of a run's feature files; may be removed at any time


@dataclass(frozen=True)
class Taken:
    """One feature of one WEIGHTS: layer `layer` in `file`, called `feature` in the report."""

    entry: Entry
    feature: str
    file: Path
    layer: str


def take_features(config: FewshotConfig, entries: Sequence[Entry], task: Task, out: Path, world: World) -> list[Taken]:
    """Compute what features are not yet in `out`, one network at a time. Collective.

    A feature file is named by what fixes it: weights, image size, images, arithmetic. It holds the union of the support
    sets and the whole query set, so that neither ImageNet's other million images nor a second run cost time.

    Raises InputError where an index is damaged or differs among nodes, and, if there is something to compute, where a
    shard is not in place or an image cannot be read (StorageError: not for now); the same on every rank.
    """
    images = on_main(lambda: _images(task, config.data.timeouts()))
    times = on_main(lambda: {"support": write_times(task.support), "query": write_times(task.query)})
    arithmetic = {"batch": config.fewshot.batch, "device": world.device.type}
    plan = []
    for entry in entries:
        for subject in subjects(entry, config.fewshot.features, config.seed):
            layers = list(subject.features.values())
            what = {"subject": subject.identity, "layers": layers, "images": images, **arithmetic}
            plan.append((entry, subject, feature_file(out / FEATURES, what)))
    # The shards may be gone once all features are taken.
    lacking = on_main(lambda: not all(kept(file, times) for *_, file in plan))
    for split, index in (("support", task.support), ("query", task.query)):
        check_index(index, f"data.{split}", world, config.data.timeouts(), files=lacking)
    taken = []
    for entry, subject, file in plan:
        name = f"{entry.id}: {' '.join(subject.features)}"
        if on_main(partial(kept, file, times)):
            _say(world, f"{name}: already in {out / FEATURES}")
        else:
            began = time.monotonic()
            _compute(config, entry, subject, task, file, times, world)
            _say(world, f"{name}: {_count(task)}, {time.monotonic() - began:.1f} s")
        taken += [Taken(entry, feature, file, layer) for feature, layer in subject.features.items()]
    return taken


def probe_features(config: FewshotConfig, taken: Sequence[Taken], task: Task, device: torch.device) -> Scores:
    """Score everything in `taken`. For one rank alone, all files in its reach.

    The λ sweep is made of each WEIGHTS's headline feature only.
    Raises InputError where features are not finite.
    """
    began = time.monotonic()
    known: dict[tuple[Path, str], tuple[list[Result], list[Sweep]]] = {}
    scores = Scores([], [], {})
    distinct = {(part.file, part.layer) for part in taken}
    with Progress("probes", "support sets", len(distinct) * len(task.draws)) as progress:
        for part in taken:
            features = [other.feature for other in taken if other.entry == part.entry]
            leading = part.feature == headline(features)
            key = part.file, part.layer
            if key not in known:
                known[key] = score(
                    read_layer(part.file, part.layer, f"weights {part.entry.path}"),
                    task.draws,
                    task.query_labels,
                    classes=task.classes,
                    probe_names=config.fewshot.probes,
                    l2=config.fewshot.l2,
                    device=device,
                    oracle=config.fewshot.oracle and leading,
                    advance=progress.advance,
                )
            results, sweeps = known[key]
            scores.results.extend(replace(row, weights=part.entry.id, features=part.feature) for row in results)
            scores.sweeps.extend(replace(row, weights=part.entry.id, features=part.feature) for row in sweeps)
    scores.seconds["probes"] = time.monotonic() - began
    return scores


def probe_given(given: Given, protocol: ProtocolSection, id: str) -> tuple[Scores, tuple[Draw, ...]]:
    """Score a user's features, as those of weights `id`. Raises InputError where a class has too few rows."""
    began = time.monotonic()
    draws = draw_support(
        given.support_labels,
        classes=given.classes,
        shots=protocol.shots,
        seeds=protocol.seeds,
        where=f"features {given.path}: support_y",
    )
    with Progress("probes", "support sets", len(draws)) as progress:
        results, sweeps = score(
            given.features,
            draws,
            given.query_labels,
            classes=given.classes,
            probe_names=protocol.probes,
            l2=protocol.l2,
            device=torch.device("cpu"),
            oracle=protocol.oracle,
            advance=progress.advance,
        )
    return Scores(
        [replace(row, weights=id, features="given") for row in results],
        [replace(row, weights=id, features="given") for row in sweeps],
        {"probes": time.monotonic() - began},
    ), draws


def _images(task: Task, timeouts: Timeouts) -> dict[str, str]:
    return {
        "support": content(task.support, task.support_ids, timeouts),
        "query": content(task.query, task.query_ids, timeouts),
    }


def _compute(
    config: FewshotConfig,
    entry: Entry,
    subject: Subject,
    task: Task,
    file: Path,
    times: Mapping[str, np.ndarray],
    world: World,
) -> None:
    model = together(subject.build).to(world.device)
    arrays = {"support_ids": task.support_ids, **{f"{split}_times": at for split, at in times.items()}}
    for split, index, ids in (
        ("support", task.support, task.support_ids),
        ("query", task.query, task.query_ids),
    ):
        found = extract(
            model,
            index,
            ids,
            layers=list(dict.fromkeys(subject.features.values())),
            image_size=entry.spec.image_size,
            channels=entry.spec.channels,
            batch=config.fewshot.batch,
            workers=config.data.workers,
            world=world,
            timeouts=config.data.timeouts(),
            doing=f"features of data.{split}",
        )
        arrays.update({f"{split}_{layer}": values for layer, values in (found or {}).items()})
    together(lambda: write_features(file, arrays) if world.main else None)


def _count(task: Task) -> str:
    return f"{len(task.support_ids):,} support and {len(task.query_ids):,} query images"


def _say(world: World, text: str) -> None:
    if world.main:
        say(text)
