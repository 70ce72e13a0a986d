"""What is learned from and what is scored: two indices, and the support sets drawn from one of them.

A support set is a function of seed, labels and ids alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewshot.config import ProtocolSection
from pretrain.errors import InputError
from pretrain.index.compare import check_classes, check_names, shared_text, unnamed_text
from pretrain.index.index import Index
from pretrain.storage.retry import Timeouts
from pretrain.stream.colour import colour_text

Paths = str | Sequence[str]
Splits = Mapping[str, tuple[Index, NDArray[np.int64]]]  # "support" and "query": index and needed ids
_NAMED = 5  # classes named in a message


@dataclass(frozen=True)
class Draw:
    """One support set: `ids` int64 [classes · shots], class by class from 0, each in the order drawn."""

    shots: int
    seed: int
    ids: NDArray[np.int64]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Their classes, int64 [classes · shots]."""
        return np.arange(len(self.ids), dtype=np.int64) // self.shots

    @property
    def sha256(self) -> str:
        """sha256 (hex) of `ids` as little-endian int64, in their order."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


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
        texts = [
            colour_text(channels, index, f"{section}.{name}", timeouts) for name, (index, _) in self.splits.items()
        ]
        return [text for text in texts if text]

    @property
    def splits(self) -> Splits:
        """Index and needed ids of the support and of the query set."""
        return {"support": (self.support, self.support_ids), "query": (self.query, self.query_ids)}

    @property
    def note(self) -> str:
        """A sentence on what is assumed of class numbers; empty where nothing is."""
        return unnamed_text([*self.support.files, *self.query.files])


def open_task(support: Paths | None, query: Paths | None, protocol: ProtocolSection, *, section: str = "data") -> Task:
    """Open both indices, check that they belong together, and draw the support sets. Reads no image.

    Images without a label (an empty list) are neither learned from nor scored.

    Args:
        section: of the config that names the indices, for messages.

    Raises:
        InputError: a path that is not set or holds no index, one named twice, images that are in both, images with
            several labels, no image with one, classes that differ, a query label that the support set lacks, a class
            with too few images.
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
    where = f"{section}.support {support}"
    draws = draw_support(labels, classes=classes, shots=protocol.shots, seeds=protocol.seeds, ids=ids, where=where)
    needed = np.unique(np.concatenate([draw.ids for draw in draws]))
    return Task(learned, scored, classes, draws, needed, query_ids, query_labels)


def _labelled(index: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids with a label, ascending, and their labels."""
    labels = index.labels(np.arange(index.samples))[:, 0]
    ids = np.flatnonzero(labels >= 0)
    return ids, labels[ids]


def draw_support(
    labels: NDArray[np.int64],
    *,
    classes: int,
    shots: Sequence[int],
    seeds: Sequence[int],
    ids: NDArray[np.int64] | None = None,
    where: str = "support",
) -> tuple[Draw, ...]:
    """The support sets of every number of shots and every seed; shots of one seed are nested.

    One `np.random.default_rng(seed)` for each seed; for class 0 … classes-1 in order, it permutes the class's ids in
    ascending order, and k shots take the first k (big_vision's few-shot evaluator).

    Args:
        labels: int64 [n] in 0 … classes-1.
        ids: distinct int64 [n]; None: row numbers. What is drawn depends on the pairs (id, label), not on their order.
        where: named in messages.

    Raises:
        InputError: a class has fewer images than the most shots; names the classes.
    """
    ids = np.arange(len(labels)) if ids is None else ids
    order = np.lexsort((ids, labels))
    counts = np.bincount(labels, minlength=classes)
    _check_counts(counts, max(shots), where)
    by_class = np.split(ids[order], np.cumsum(counts)[:-1])
    draws = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        permuted = [generator.permutation(members) for members in by_class]
        draws += [Draw(k, seed, np.concatenate([members[:k] for members in permuted])) for k in shots]
    return tuple(draws)


def _check_counts(counts: NDArray[np.int64], shots: int, where: str) -> None:
    short = np.flatnonzero(counts < shots)
    if not len(short):
        return
    few = ", ".join(f"class {label} has {counts[label]}" for label in short[:_NAMED])
    rest = f" and {len(short) - _NAMED} more classes have too few" if len(short) > _NAMED else ""
    most = int(counts.min())
    right = f"at most {most} shots" if most else "labels 0 … C-1 that all occur"
    raise InputError(
        f"{where}: {shots} shots need {shots} images of each of {len(counts)} classes; {few}{rest}; {right}, "
        "or more support images, would be right"
    )
