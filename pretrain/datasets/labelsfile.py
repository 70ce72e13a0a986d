"""labels.json: lists of labels for the images of a folder.

    {"classes": ["beach", "dog", "sea"],
     "labels": {"2019/1.jpg": ["dog", "beach"], "2019/2.jpg": []}}

Paths are relative to the folder of that file. Labels are names from "classes" or, without "classes", numbers from 0.
Every image has to be listed, and every listed file of the split has to exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.datasets.dataset import Dataset
from pretrain.datasets.files import file_dataset, images, read_text, shown
from pretrain.errors import InputError
from pretrain.storage.filekind import IMAGE_ENDINGS

LABELS_NAME = "labels.json"


def with_lists(name: str, split: str, base: Path, listing: Path) -> Dataset:
    """The images below `base`, which is the folder of `listing` or in it, with the labels listed there. Raises
    InputError where images and list do not match.
    """
    try:
        content = json.loads(read_text(listing), object_pairs_hook=lambda pairs: _no_key_twice(pairs, listing))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{listing}: cannot be read as JSON: {error}") from error
    classes = content.get("classes") if isinstance(content, dict) else None
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if classes is not None and named and len(set(classes)) < len(classes):
        raise InputError(f'{listing}: "classes" has a name twice; each class is one label')
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("labels"), dict)
        or set(content) - {"classes", "labels"}
        or not (classes is None or named)
    ):
        raise InputError(
            f'{listing}: is {{"classes": […], "labels": {{path: [labels], …}}}}; "classes" may be left out'
        )
    numbers = None if classes is None else {name: number for number, name in enumerate(classes)}
    below = os.path.relpath(base, listing.parent)
    files = list(images(base, base))
    listed = _no_key_twice(((os.path.normpath(path), value) for path, value in content["labels"].items()), listing)
    paths = [os.path.normpath(os.path.join(below, file)) for file in files]
    if unlisted := [path for path in paths if path not in listed]:
        raise InputError(
            f"{listing}: {len(unlisted):,} of {len(paths):,} images are not listed ({shown(unlisted)}); an image "
            "without labels is listed with []"
        )
    labels: list[int] = []
    starts = [0]
    for path in paths:
        labels += _numbered(listed.pop(path), numbers, f"{listing}: {path!r}")
        starts.append(len(labels))
    if left := [path for path in listed if below == "." or path.startswith(below + os.sep)]:
        raise InputError(
            f"{listing}: {len(left):,} files are listed that are no images below {listing.parent} ({shown(left)}); "
            f"images are called {', '.join(IMAGE_ENDINGS)}"
        )
    return file_dataset(name, split, base, files, labels, classes, np.array(starts))


def _no_key_twice(pairs: Iterable[tuple[str, Any]], listing: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{listing}: has {key!r} twice")
        found[key] = value
    return found


def _numbered(value: Any, numbers: dict[str, int] | None, where: str) -> list[int]:
    right = "a list of names out of classes" if numbers is not None else "a list of numbers from 0"
    if not isinstance(value, list):
        raise InputError(f"{where}: found {value!r}; labels are {right}")
    found = []
    for label in value:
        known = label if numbers is None else numbers.get(label) if isinstance(label, str) else None
        if type(known) is not int or not 0 <= known < 1 << 31:
            raise InputError(f"{where}: label {label!r}; labels are {right}")
        found.append(known)
    if len(set(found)) < len(found):
        raise InputError(f"{where}: found {value!r}; a class is listed once")
    return found
