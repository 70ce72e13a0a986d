"""The splits of a folder: what people call their folders, and which one is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pretrain.datasets.files import folders, image_folders, loose_images, note, shown
from pretrain.datasets.labelsfile import LABELS_NAME
from pretrain.errors import InputError
from pretrain.files import exists

_SPLITS = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val", "eval": "val",
    "evaluation": "val",
    "test": "test", "testing": "test", "tst": "test",
    "trainval": "trainval",
}  # fmt: skip
_FILLERS = {"set", "data", "dataset", "split", "image", "images", "img", "imgs", "folder"}
# Beside classes or in a split, these are no classes: images without labels, or something else about them.
HOLDERS = {
    "image", "images", "img", "imgs", "jpg", "jpeg", "jpgs", "jpegs", "png", "jpegimages", "annotation", "annotations",
}  # fmt: skip

_NO_CLASSES = HOLDERS | {
    "masks", "labels", "trimaps", "segmentation", "segmentations", "ground_truth", "groundtruth", "thumbnails",
}  # fmt: skip


def split_name(folder: str) -> str | None:
    """`train`, `val`, `test` or `trainval` for a folder whose whole name means that, in any spelling (`Training`,
    `test_set`, `val2017`); else None.
    """
    words = [word for word in _words(folder) if word not in _FILLERS]
    return "trainval" if words == ["train", "val"] else _SPLITS.get(words[0]) if len(words) == 1 else None


def bears_split_name(folder: str) -> bool:
    """Whether a word in a folder's name is a split's: `seg_train`, `train.X1`, and also the class `bullet_train`."""
    return any(word in _SPLITS for word in _words(folder))


def is_holder(folder: str) -> bool:
    return folder.lower() in HOLDERS


def is_no_class(folder: str) -> bool:
    """Whether a folder's name says that it holds images of another kind, or images without labels."""
    return folder.lower() in _NO_CLASSES


def _words(folder: str) -> list[str]:
    words = re.findall(r"[a-z]+", folder.lower())
    return [word.removesuffix("set") if word.removesuffix("set") in _SPLITS else word for word in words]


def choose(folder: Path, split: str | None, splits: Mapping[str, Path]) -> str:
    """The name in `splits` of the split asked for: by its name, its folder's, or another spelling. By default train, or
    the only one.
    """
    if split is None:
        usual = [name for name in ("train", "trainval", *splits) if name in splits]
        if len(splits) == 1 or usual[0] in ("train", "trainval"):
            return usual[0]
        raise InputError(f"{folder}: has the splits {', '.join(splits)}; say which: --split {usual[0]}")
    for name, path in splits.items():
        if split == name or (split == path.name and name != "all"):
            return name
    same = split_name(split)
    if same is None or same not in splits:
        raise InputError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
    return same


def name_splits(root: Path, split_of: Mapping[str, str], split: str | None) -> dict[str, Path]:
    """The splits' folders (or files) by name, given the split that each one is; where several are the same split, each
    goes by its own name.

    Raises InputError where `split` may mean several of them.
    """
    splits = {}
    for name, called in split_of.items():
        same = [other for other in split_of if split_of[other] == called]
        if len(same) > 1 and split not in split_of and (split is None or split_name(split) == called):
            raise InputError(
                f"{root}: {same[0]}/ and {same[1]}/ would both be the split {called}; keep one here, or take one of "
                f"them by its folder's name: --split {same[0]}"
            )
        splits[called if len(same) == 1 else name] = root / name
    return splits


def find_splits(root: Path, split: str | None) -> dict[str, Path]:
    """The splits' folders by name; {"all": root} where there are none. Raises InputError where that is ambiguous."""
    names = image_folders(root)
    plain = [name for name in names if split_name(name)]
    akin = [name for name in names if not split_name(name) and bears_split_name(name)]
    others = [name for name in names if name not in (*plain, *akin)]
    nested = any(not loose_images(root / name) for name in akin)  # bullet_train holds images, seg_train classes
    if not (plain or (akin and (nested or not others))):
        return {"all": root}
    if exists(root / LABELS_NAME) and (akin or others):  # folders mean nothing
        return {"all": root}
    splits = {name: root / name for name in akin}
    splits.update(name_splits(root, {name: str(split_name(name)) for name in plain}, split))
    if plain and not others:
        if beside := set(folders(root)) - set(names):
            note(f"{root}: passed over folders without images: {shown(beside)}")
        return splits
    if split == "all":
        return {"all": root}
    if split is not None and (split in (*splits, *plain) or split_name(split) in splits):
        note(f"{root}: takes {', '.join(plain + akin)} for splits; passed over {shown(others) or 'nothing'}")
        return splits
    raise InputError(
        f"{root}: holds {shown(f'{name}/' for name in (*plain, *akin))}, called like splits"
        + (f", and beside them {shown(f'{name}/' for name in others)}, with images in each" if others else "")
        + f"; --split {next(iter(splits))} takes that split (then no other folder is a class), --split all takes each "
        "folder as a class"
    )
