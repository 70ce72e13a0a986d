"""Whether index files go together: they number their classes alike, and none holds the samples of another.

Samples are compared by their shards' places, by the recorded content, or else by their keys.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.errors import InputError
from pretrain.index.indexfile import IndexFile, sha256_of


def check_classes(names: tuple[str, ...] | None, others: tuple[str, ...] | None, where: str, elsewhere: str) -> None:
    """Raise InputError where two indices name their classes and number them differently."""
    if names is None or others is None or names == others:
        return
    at = next((label for label, (a, b) in enumerate(zip(names, others, strict=False)) if a != b), None)
    label = min(len(names), len(others)) if at is None else at
    here, there = (repr(known[label]) if label < len(known) else "absent" for known in (names, others))
    raise InputError(
        f"{elsewhere}: class {label} is {there} here and {here} in {where}; both must number the same classes alike: "
        "build or index them with one list of classes"
    )


def check_names(files: Sequence[IndexFile]) -> None:
    """Raise InputError where a file has labels beyond the classes that one of them names."""
    named = next((file for file in files if file.classes), None)
    if named is None:
        return
    names = len(named.classes or ())
    for file in files:
        if file.num_classes > names:
            raise InputError(
                f"{file.path}: has labels up to {file.num_classes - 1}, and {named.path} names {names} classes; both "
                "must number the same classes alike"
            )


def unnamed_text(files: Sequence[IndexFile]) -> str:
    """In words, which files lack class names beside one that has them, so their numbering is assumed; else empty."""
    named = next((file for file in files if file.classes), None)
    unnamed = [str(file.path) for file in files if not file.classes]
    if named is None or not unnamed:
        return ""
    return f"{', '.join(unnamed)}: without names of its classes, taken to number them as {named.path} does"


@dataclass(frozen=True)
class SharedShard:
    """Shard number `one` of an index file and number `other` of another, which hold the same samples.

    `known`: they are one file, or have one sha256. Otherwise offsets, keys and labels of all samples are equal and one
    of the two has no sha256, so their images may still differ.
    """

    one: int
    other: int
    known: bool


class _Shards:
    """The shards of an index file by location, and by what two shards of the same samples have in common."""

    def __init__(self, file: IndexFile) -> None:
        self.file = file
        self.urls = {file.shard_url(shard): shard for shard in range(file.num_shards)}
        self.alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self.outlines = _outlines(file)
        for shard, outline in enumerate(self.outlines):
            self.alike[outline].append(shard)


def shared_shards(one: IndexFile, other: IndexFile) -> Iterator[SharedShard]:
    """The shards of `one` that `other` holds too, in the order of `one`; reads keys only of likely pairs."""
    return _shared(_Shards(one), _Shards(other))


def _shared(one: _Shards, other: _Shards) -> Iterator[SharedShard]:
    if one.urls.keys().isdisjoint(other.urls) and one.alike.keys().isdisjoint(other.alike):
        return
    for url, shard in one.urls.items():
        if url in other.urls:
            yield SharedShard(shard, other.urls[url], True)
            continue
        for twin in other.alike.get(one.outlines[shard], ()):
            digests = {sha256_of(one.file.digest(shard)), sha256_of(other.file.digest(twin))}
            known = "" not in digests
            if len(digests) == 1 if known else _same_samples(one.file, shard, other.file, twin):
                yield SharedShard(shard, twin, known)
                break


def refuse_shared(files: Sequence[IndexFile]) -> None:
    """Raise InputError where two files hold the same samples, all or some: they would come twice an epoch."""
    if len(files) < 2:
        return
    tables = list(map(_Shards, files))
    for number, table in enumerate(tables):
        if text := _shared_text([table], tables[:number]):
            raise InputError(f"{text}; index each shard once")


def shared_text(files: Sequence[IndexFile], others: Sequence[IndexFile]) -> str:
    """The first of `files` that holds samples of one of `others`, in words; empty where none does."""
    return _shared_text(list(map(_Shards, files)), list(map(_Shards, others)))


def _shared_text(tables: Sequence[_Shards], others: Sequence[_Shards]) -> str:
    for table, against in itertools.product(tables, others):
        file, other = table.file, against.file
        shared = list(_shared(table, against))
        if not shared:
            continue
        first = shared[0]
        if len(shared) == file.num_shards == other.num_shards:
            what = f"holds the samples of {other.path} again"
        else:
            url, there = file.shard_url(first.one), other.shard_url(first.other)
            also = "does" if url == there else f"has them in {there}"
            what = f"holds the samples of the shard {url}, as {other.path} {also}"
        return f"{file.path}: {what}{'' if all(one.known for one in shared) else f'; {UNKNOWN}'}"
    return ""


# What to do where keys, labels and sizes are equal and the images are not known.
UNKNOWN = (
    "recognised by their keys, labels and sizes alone: if their images differ, record what they hold, in both indices "
    "(launch/shards.py index without --headers-only, of remote shards with --sha256)"
)


def _outlines(file: IndexFile) -> list[tuple[int, ...]]:
    """Of each shard, a few numbers that two shards of the same samples have in common: sizes, first and last key."""
    ends = np.clip([file.first[:-1], file.first[1:] - 1], 0, file.samples - 1)
    columns = (np.diff(file.first), file.shard_bytes, file.data_end, *file.key_hashes[ends])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _same_samples(one: IndexFile, shard: int, other: IndexFile, twin: int) -> bool:
    """Whether two shards have equal keys, offsets and labels."""
    return all(map(np.array_equal, _columns(one, shard), _columns(other, twin)))


def _columns(file: IndexFile, shard: int) -> Iterator[np.ndarray]:
    rows = slice(int(file.first[shard]), int(file.first[shard + 1]))
    yield file.offsets[rows]
    yield file.key_hashes[rows]
    if file.label_starts is None:
        yield file.labels[rows]
        return
    starts = file.label_starts[rows.start : rows.stop + 1].astype(np.int64)
    yield starts - starts[0]
    yield file.labels[starts[0] : starts[-1]]
