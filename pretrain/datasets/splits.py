"""What people call the folders of splits, and those that only hold a set's images."""

from __future__ import annotations

import re

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
    """`train`, `val`, `test` or `trainval` for a folder whose name says just that, however it is spelt (`Training`,
    `test_set`, `val2017`); else None.
    """
    words = [word for word in _words(folder) if word not in _FILLERS]
    return "trainval" if words == ["train", "val"] else _SPLITS.get(words[0]) if len(words) == 1 else None


def bears_split_name(folder: str) -> bool:
    """Whether a word of a folder's name is a split's: `seg_train`, `train.X1`; but also the class `bullet_train`."""
    return any(word in _SPLITS for word in _words(folder))


def is_holder(folder: str) -> bool:
    return folder.lower() in HOLDERS


def is_no_class(folder: str) -> bool:
    """Whether a folder beside others holds images of another kind by its name, or images without labels."""
    return folder.lower() in _NO_CLASSES


def _words(folder: str) -> list[str]:
    words = re.findall(r"[a-z]+", folder.lower())
    return [word.removesuffix("set") if word.removesuffix("set") in _SPLITS else word for word in words]
