"""Groups of images for the page of a report: support images, nearest neighbours, worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewshot.closeup import Closeup, Near
from pretrain.console import isolated
from pretrain.errors import InputError, StorageError
from pretrain.index.index import Index
from pretrain.page.page import Group, Picture
from pretrain.page.text import shortened
from pretrain.shards.page import sample_picture
from pretrain.shards.survey import AT_ONCE, read_image
from pretrain.workers import in_threads

_SUPPORT = 80  # pictures of support images
_OF_EACH = 5  # of each class at least, where there are as many
_LETTERS = 40  # of a caption; the table of classes has all


def fault(closeup: Closeup) -> str:
    """Why there are no images to show; empty where there are. Asks for one image of each index."""
    if closeup.indices is None:
        return "the features were given by a file; there are no images to show"
    try:
        for index, ids in zip(closeup.indices, (closeup.draw.ids, closeup.query_ids), strict=True):
            read_image(index, int(ids[0]))
    except InputError as error:  # features are kept: the shards need not be there any more
        return f"the images cannot be shown: {error}"
    return ""


def support_groups(closeup: Closeup) -> list[Group]:
    """The support images by class: of many classes some, spread evenly, and of many shots the first."""
    index, _ = _indices(closeup)
    shots, classes = closeup.draw.shots, len(closeup.draw.ids) // closeup.draw.shots
    each = min(shots, max(_OF_EACH, _SUPPORT // classes))
    shown = np.linspace(0, classes - 1, min(classes, _SUPPORT // each)).round().astype(int).tolist()
    ids = [closeup.draw.ids[label * shots : label * shots + each].tolist() for label in shown]
    pictures = iter(_pictures(index, [(id, f"id {id}", "") for row in ids for id in row]))
    more = f"the first {each} of {shots}" if each < shots else ""
    return [
        Group(closeup.name(label), more, [next(pictures) for _ in row]) for label, row in zip(shown, ids, strict=True)
    ]


def neighbour_groups(closeup: Closeup) -> list[Group]:
    """Query images, each with its nearest support images."""
    groups = []
    for near, (query, others) in zip(closeup.neighbours, _with_query(closeup, closeup.neighbours), strict=True):
        label, predicted = int(closeup.labels[near.row]), int(closeup.predicted[near.row])
        said = "predicted as such" if label == predicted else f"taken for {isolated(closeup.name(predicted))}"
        groups.append(Group(closeup.name(label), said, [query, *others], marked=1))
    return groups


def mistake_groups(closeup: Closeup) -> list[Group]:
    """The worst mistakes, each with the nearest support image of the class that was predicted."""
    found = _with_query(closeup, [one.near for one in closeup.mistakes])
    groups = []
    for one, (query, others) in zip(closeup.mistakes, found, strict=True):
        label, predicted = (closeup.name(int(of[one.near.row])) for of in (closeup.labels, closeup.predicted))
        said = f"taken for {isolated(predicted)}, ahead by {one.margin:.3g}"
        groups.append(Group(label, said, [query, *others], marked=1))
    return groups


def _with_query(closeup: Closeup, found: Sequence[Near]) -> list[tuple[Picture, list[Picture]]]:
    """The pictures of query images, and of the support images near to them."""
    support, query = _indices(closeup)
    labels, ids = closeup.draw.labels, closeup.draw.ids
    rows = [near.row for near in found]
    queries = _pictures(query, [(int(closeup.query_ids[row]), "query", f"id {closeup.query_ids[row]}") for row in rows])
    near_by = [
        (int(ids[place]), shortened(closeup.name(int(labels[place])), _LETTERS), f"cosine {cosine:.3f}")
        for near in found
        for place, cosine in zip(near.places, near.cosines, strict=True)
    ]
    others = iter(_pictures(support, near_by))
    return [(one, [next(others) for _ in near.places]) for one, near in zip(queries, found, strict=True)]


def _pictures(index: Index, wanted: Sequence[tuple[int, str, str]]) -> list[Picture]:
    """Pictures of samples: id, caption and detail of each. One that cannot be read says why."""
    silent: list[str] = []  # a server that does not answer is not waited for once more for every image

    def picture(one: tuple[int, str, str], _: object) -> Picture:
        if silent:
            return Picture(*one[1:], None, silent[0])
        try:
            return sample_picture(index, *one)
        except InputError as error:
            if isinstance(error, StorageError):
                silent.append(str(error))
            return Picture(*one[1:], None, str(error))

    return list(in_threads(picture, wanted, AT_ONCE))


def _indices(closeup: Closeup) -> tuple[Index, Index]:
    assert closeup.indices is not None
    return closeup.indices
