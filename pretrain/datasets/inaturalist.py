"""iNaturalist's sets of 2017 to 2019: one folder of images for both splits, train_val2018/<super category>/<category>/,
and a list for each, train2018.json and val2018.json, in COCO's form. (That of 2021 is an image folder.)
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np

from pretrain.datasets.dataset import Dataset
from pretrain.datasets.files import file_dataset, folders, read_text
from pretrain.datasets.folder import choose, name_splits
from pretrain.datasets.splits import split_name
from pretrain.errors import InputError

_IMAGES = re.compile(r"train_val(20\d\d|_images)")
_LIST = re.compile(r"(train|val)20\d\d\.json")


def is_inaturalist(folder: Path) -> bool:
    """Whether its images lie there, and a list or a year in the name says whose they are."""
    found = [name for name in folders(folder) if _IMAGES.fullmatch(name)]
    return bool(found) and (found != ["train_val_images"] or bool(_lists(folder)))


def open_inaturalist(folder: Path, split: str | None) -> Dataset:
    """Its split "train" (default) or "val". Classes are the lists' categories, in the order of their numbers."""
    splits = name_splits(folder, _lists(folder), split or "train")
    if not splits:
        raise InputError(
            f"{folder}: holds iNaturalist's images, whose splits and classes stand in lists that are not there; unpack "
            "train20….json and val20….json there"
        )
    chosen = choose(folder, split, splits)
    listing = splits[chosen]
    try:
        content = json.loads(read_text(listing))
        paths = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
        rows = sorted((paths[row["image_id"]], int(row["category_id"])) for row in content["annotations"])
        numbers = {category: number for number, category in enumerate(sorted(names))}
        labels = np.array([numbers[category] for _, category in rows], np.int32)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{listing}: not iNaturalist's ({type(error).__name__}: {error}): images with id and file_name, "
            "annotations with image_id and category_id, categories with id and name would be right"
        ) from error
    files = [file for file, _ in rows]
    if len(set(files)) < len(files):
        twice = next(file for file, after in itertools.pairwise(files) if file == after)
        raise InputError(f"{listing}: has {twice} twice; one category an image would be right")
    unique = len(set(names.values())) == len(names)
    classes = [names[category] if unique else f"{category} {names[category]}" for category in numbers]
    return file_dataset("inaturalist", chosen, folder, files, labels, None, classes)


def _lists(folder: Path) -> dict[str, str]:
    return {path.name: str(split_name(path.stem)) for path in sorted(folder.iterdir()) if _LIST.fullmatch(path.name)}
