"""What is scored: labelled sets, opened and checked against each other and against the networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.config import DataSection
from pretrain.errors import InputError
from pretrain.index.compare import check_classes, check_names, unnamed_text
from pretrain.index.index import Index
from pretrain.ranks.collectives import World, together
from pretrain.stream.colour import colour_text
from pretrain.training.setup import check_index
from pretrain.weights.networks import Network


@dataclass(frozen=True)
class LabelledSet:
    """A set that is scored.

    Args:
        name: "eval" or "real", its key under `data`.
    """

    name: str
    index: Index

    @property
    def key(self) -> str:
        return f"data.{self.name}"

    @property
    def labels(self) -> NDArray[np.int64]:
        """Of all its images, int64 [n, L], padded with −1."""
        return self.index.labels(np.arange(self.index.samples))


def open_sets(data: DataSection, world: World) -> list[LabelledSet]:
    """Open `data.eval` and `data.real`, those that are set. Collective.

    Raises:
        InputError: neither is set, one is damaged or not in place, has no label, or numbers classes otherwise than the
            other; `data.real` has no lists of labels.
    """
    paths = {"eval": data.eval, "real": data.real}
    sets = []
    for name, path in paths.items():
        if path is None:
            continue
        index = together(lambda path=path, key=f"data.{name}": _open(path, key))  # type: ignore[misc]
        check_index(index, f"data.{name}", world, data.timeouts())
        sets.append(LabelledSet(name, index))
    if not sets:
        raise InputError(
            "data.eval: null; set it to an INDEX (a folder of shards that holds one, or an index file): data.eval=PATH"
        )
    names = {one.name: one.index.classes for one in sets}
    if len(names) == 2:
        check_classes(names["eval"], names["real"], "data.eval", "data.real")
    return sets


def _open(path: str | Sequence[str], key: str) -> Index:
    index = Index.open(path if isinstance(path, str) else list(path))
    try:
        index.check_distinct()
        check_names(index.files)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if index.unlabelled == index.samples:
        raise InputError(
            f"{key}: none of the {index.samples:,} images has a label, so there is nothing to score; set an index with "
            "labels"
        )
    if key == "data.real" and not index.multilabel:
        raise InputError(
            "data.real: its images have one label each, and ReaL's have lists; give this index as data.eval, or the "
            "index of a set built from labels.json"
        )
    return index


def check_network(network: Network, sets: Sequence[LabelledSet]) -> None:
    """Refuse a network that cannot be scored.

    Raises:
        InputError: it has no classification layer, or fewer outputs than a set has classes.
    """
    outputs = network.spec.num_classes
    if not outputs:
        raise InputError(
            f"weights {network.path}: the network has no classification layer, so it predicts no class; fine-tune it "
            "first (launch/finetune.py), or score its features (launch/fewshot.py)"
        )
    for one in sets:
        if one.index.num_classes > outputs:
            raise InputError(
                f"{one.key}: has labels up to {one.index.num_classes - 1}, and the network of {network.path} has "
                f"{outputs} outputs, for labels up to {outputs - 1}; weights for these classes would be right"
            )


def notes(networks: Sequence[Network], sets: Sequence[LabelledSet], data: DataSection) -> list[str]:
    """What limits the meaning of the scores, a sentence each. Looks at some images."""
    found = [text for text in [unnamed_text([file for one in sets for file in one.index.files])] if text]
    for one in sets:
        index = one.index
        if index.unlabelled:
            found.append(
                f"{one.key}: {index.unlabelled:,} of {index.samples:,} images have no label and are not scored"
            )
        for channels in sorted({network.spec.channels for network in networks}):
            if text := colour_text(channels, index, one.key, data.timeouts()):
                found.append(text)
        classes = max(index.num_classes, len(index.classes or ()))
        trained = {index.hash: "", index.sequence: " (by keys, labels and sizes)"}
        for network in networks:
            if network.spec.num_classes > classes:
                found.append(
                    f"{network.id}: has {network.spec.num_classes:,} outputs, {one.key} {classes:,} classes; a "
                    "prediction of any other output is wrong"
                )
            if network.trained_on in trained:
                found.append(f"{network.id}: was trained on the images of {one.key}{trained[network.trained_on]}")
    return found


def class_names(sets: Sequence[LabelledSet]) -> list[str] | None:
    """The names of the classes, where a set has them."""
    names = next((one.index.classes for one in sets if one.index.classes), None)
    return list(names) if names else None
