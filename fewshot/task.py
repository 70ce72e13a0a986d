"""What is learned from and what is scored: two indices, and the support sets drawn from one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewshot.draw import Draw, draw_support
from pretrain.errors import InputError
from pretrain.index.compare import check_classes, check_names, shared_text, unnamed_text
from pretrain.index.index import Index
from pretrain.storage.retry import Timeouts

Paths = str | Sequence[str]


@dataclass(frozen=True)
class Task:
    """A classification task of `classes` classes, 0 … classes-1, as the support set has them."""

    support: Index
    query: Index
    classes: int
    draws: tuple[Draw, ...]
    support_ids: NDArray[np.int64]  # what any of the draws needs, ascending
    query_ids: NDArray[np.int64]  # those with a label, ascending: an image without one is neither right nor wrong
    query_labels: NDArray[np.int64]  # of `query_ids`

    def colour_notes(self, channels: int, timeouts: Timeouts, section: str = "data") -> list[str]:
        """Where a network of `channels` and the images of either index do not fit, a sentence each. Looks at some."""
        from pretrain.stream.colour import colour_text  # here, because it brings torch

        indices = {"support": self.support, "query": self.query}
        texts = [colour_text(channels, index, f"{section}.{name}", timeouts) for name, index in indices.items()]
        return [text for text in texts if text]

    @property
    def note(self) -> str:
        """What is taken on trust of the classes, in words; empty where nothing is."""
        return unnamed_text([*self.support.files, *self.query.files])


def open_task(
    support: Paths | None,
    query: Paths | None,
    *,
    shots: Sequence[int],
    seeds: Sequence[int],
    section: str = "data",
) -> Task:
    """Open both indices, check that they belong together, and draw. Reads no image.

    Images without a label (an empty list) are neither learned from nor scored.

    `section` says in messages where the config names the indices.
    Raises InputError: a path that is not set or holds no index, one named twice, images that are in both, images with
    several labels, no image with one, classes that differ, a query label that the support set lacks, a class with too
    few images.
    """
    indices = {}
    for name, paths in (("support", support), ("query", query)):
        if paths is None:
            raise InputError(
                f"{section}.{name}: null; set it to an INDEX (a folder of shards that holds one, or an index "
                f"file): {section}.{name}=PATH"
            )
        indices[name] = Index.open(paths if isinstance(paths, str) else list(paths))
        try:
            indices[name].check_distinct()
            check_names(indices[name].files)
        except InputError as error:
            raise InputError(f"{section}.{name}: {error}") from None
        if indices[name].longest != 1:
            what = "images with several labels" if indices[name].longest else "no image with a label"
            raise InputError(f"{section}.{name}: {paths} has {what}; few-shot needs one label an image")
    learned, scored = indices["support"], indices["query"]
    check_classes(learned.classes, scored.classes, f"{section}.support", f"{section}.query")
    if shared := shared_text(scored.files, learned.files):
        raise InputError(
            f"{section}.query: {shared}, from which {section}.support is drawn: what was learned from would be scored; "
            "other images for one of the two would be right"
        )
    classes = learned.num_classes
    if classes < 2:
        raise InputError(f"{section}.support: {support} holds {classes} class; two or more would be right")
    query_ids, query_labels = _labelled(scored)
    if scored.num_classes > classes:
        strange = int((query_labels >= classes).sum())
        raise InputError(
            f"{section}.query: {strange} of {len(query_ids)} images have labels above {classes - 1}, the "
            f"highest in {section}.support; both must number the same classes alike"
        )
    ids, labels = _labelled(learned)
    draws = draw_support(
        labels, classes=classes, shots=shots, seeds=seeds, ids=ids, where=f"{section}.support {support}"
    )
    needed = np.unique(np.concatenate([draw.ids for draw in draws]))
    return Task(learned, scored, classes, draws, needed, query_ids, query_labels)


def _labelled(index: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids with a label, ascending, and their labels."""
    labels = index.labels(np.arange(index.samples))[:, 0]
    ids = np.flatnonzero(labels >= 0)
    return ids, labels[ids]
