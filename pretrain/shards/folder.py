"""Image folders as users have them: a folder per class, folders per split, label lists, and ImageNet's
layouts.

    DIR/cat/1.jpg                   no splits: one split, "all"
    DIR/train/cat/1.jpg             splits: every sub-folder is called train, val, valid, validation, test or
    trainval DIR/images/…                    either of them, one folder down

The classes are the sorted names of the class folders of all splits together, so that a label means the same
in each.

With a file `labels.json` in DIR or in the split's folder, images have lists of labels and folders mean
nothing:

    {"classes": ["beach", "dog", "sea"],
     "labels": {"2019/1.jpg": ["dog", "beach"], "2019/2.jpg": []}}

Paths start from the folder of that file; labels are names out of "classes", or, without "classes", numbers
from 0. Every image has to be listed and every listed file of the split has to exist.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.console import say
from pretrain.errors import InputError
from pretrain.shards.dataset import Dataset, UnreadableFile, as_stored, fingerprint

SPLIT_NAMES = ("train", "val", "valid", "validation", "test", "trainval")
IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
LABELS_NAME = "labels.json"
_WNID = re.compile(r"n\d{8}")


def open_folder(folder: Path, split: str | None = None) -> Dataset:
    """The data set of an image folder. The split defaults to "train" where the folder has splits.

    Raises InputError for a folder without images, an unknown split, and lists that do not match the files.
    """
    root = _root(folder)
    splits = [name for name in _folders(root) if name in SPLIT_NAMES]
    if splits and len(splits) == len(_folders(root)):
        chosen = _choose(folder, split, splits)
        base = root / chosen
    else:
        chosen = _choose(folder, split, ["all"])
        splits, base = [], root
    for place in (base, root):
        if (place / LABELS_NAME).exists():
            return _with_lists(folder.name, chosen, base, place / LABELS_NAME)
    classes = sorted({name for place in splits or ["."] for name in _folders(root / place)})
    return class_folders(folder.name, chosen, base, classes)


def open_imagenet(folder: Path, split: str | None = None) -> Dataset:
    """ImageNet, "train" (default) or "val": DIR/train/<wnid>/, and DIR/val/<wnid>/ or a flat val/ beside
    Kaggle's LOC_val_solution.csv; Kaggle's own tree (DIR/ILSVRC/Data/CLS-LOC) too. Classes are the sorted
    wnids.
    """
    chosen = _choose(folder, split, ["train", "val"])
    kaggle = folder / "ILSVRC" / "Data" / "CLS-LOC"
    root = kaggle if kaggle.is_dir() else folder
    base = root / chosen
    if not base.is_dir():
        hint = ""
        if any(folder.glob("ILSVRC2012_img_*.tar")):
            hint = f"; unpack the archives first: torchvision.datasets.ImageNet('{folder}', '{chosen}') does"
        raise InputError(f"{base}: no such folder; ImageNet is {root}/train/<wnid>/*.JPEG and {root}/val/{hint}")
    splits = [name for name in ("train", "val") if (root / name).is_dir()]
    classes = sorted({name for place in splits for name in _folders(root / place) if _WNID.fullmatch(name)})
    if any(_WNID.fullmatch(name) for name in _folders(base)):
        return class_folders("imagenet", chosen, base, classes)
    return _flat_imagenet(chosen, base, folder / "LOC_val_solution.csv", classes)


def class_folders(name: str, split: str, base: Path, classes: Sequence[str]) -> Dataset:
    """One folder a class, images at any depth below; rows sorted by class, then by path."""
    if not classes:
        raise InputError(f"{base}: no class folders; an image folder is DIR/<class>/*.jpg, or has a {LABELS_NAME}")
    files: list[str] = []
    labels: list[int] = []
    empty = []
    for label, folder in enumerate(classes):
        below = _images(base / folder, base) if (base / folder).is_dir() else []
        found = [os.path.join(folder, file) for file in below]
        files += found
        labels += [label] * len(found)
        if not found:
            empty.append(folder)
    if empty:
        _note(f"{base}: {len(empty)} of {len(classes)} classes have no images here, e.g. {empty[0]}")
    return file_dataset(name, split, base, files, np.array(labels, np.int32), None, classes)


def file_dataset(
    name: str,
    split: str,
    base: Path,
    files: Sequence[str],
    labels: np.ndarray,
    starts: np.ndarray | None,
    classes: Sequence[str] | None,
) -> Dataset:
    """A data set of image files below `base`, read when their turn comes."""

    def read(row: int) -> tuple[str, bytes]:
        path = base / files[row]
        try:
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                raise UnreadableFile(f"{path}: no regular file ({stat.filemode(mode)})")  # opened, a FIFO would wait
            data = path.read_bytes()
        except PermissionError as error:
            raise UnreadableFile(f"{path}: cannot be read: {error.strerror}") from error
        except OSError as error:
            if path.is_symlink() and not path.exists():
                raise UnreadableFile(f"{path}: a link to {os.readlink(path)}, which is not there") from error
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        return as_stored(data, str(path))

    names = (os.fsencode(file) + b"\0" for file in [*files, *(classes or ())])
    offsets = [] if starts is None else [starts.astype(np.int64)]
    return Dataset(
        name=name,
        split=split,
        labels=labels.astype(np.int32),
        starts=starts,
        classes=None if classes is None else tuple(classes),
        fingerprint=fingerprint([*names, labels.astype(np.int32), *offsets]),
        read=read,
        files=fingerprint([np.array([_size_and_time(base, file) for file in files], np.int64)]),
    )


def _size_and_time(base: Path, file: str) -> tuple[int, int]:
    try:
        found = os.stat(os.path.join(base, file))
    except OSError:  # reading it says what is wrong
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _with_lists(name: str, split: str, base: Path, listing: Path) -> Dataset:
    try:
        content = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{listing}: cannot be read as JSON: {error}") from error
    classes = content.get("classes") if isinstance(content, dict) else None
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
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
    files = list(_images(base, base))
    listed = {os.path.normpath(path): value for path, value in content["labels"].items()}
    labels: list[int] = []
    starts = [0]
    for file in files:
        place = os.path.normpath(os.path.join(below, file))
        if place not in listed:
            raise InputError(f"{listing}: image {place!r} is not listed; an image without labels is listed with []")
        labels += _numbered(listed.pop(place), numbers, f"{listing}: {place!r}")
        starts.append(len(labels))
    left = [path for path in listed if below == "." or path.startswith(below + os.sep)]
    if left:
        raise InputError(f"{listing}: {left[0]!r} is listed, but there is no such image below {listing.parent}")
    return file_dataset(name, split, base, files, np.array(labels, np.int32), np.array(starts), classes)


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


def _flat_imagenet(split: str, base: Path, solution: Path, classes: Sequence[str]) -> Dataset:
    """Kaggle's val/: the first word of a row's PredictionString is the wnid."""
    if not solution.exists() or not classes:
        raise InputError(
            f"{base}: no <wnid> folders; sort the images into val/<wnid>/, or keep train/<wnid>/ and "
            f"Kaggle's {solution.name} in {solution.parent}"
        )
    try:
        with open(solution, newline="", encoding="utf-8") as rows:
            wnids = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(rows)}
    except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{solution}: not Kaggle's: a column ImageId, and a column PredictionString that begins with a wnid in "
            "each row, would be right"
        ) from error
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    files = list(_images(base, base))
    labels = []
    for file in files:
        wnid = wnids.get(Path(file).stem)
        if wnid not in numbers:
            raise InputError(f"{solution}: {file} has class {wnid}, which train/ does not")
        labels.append(numbers[wnid])
    return file_dataset("imagenet", split, base, files, np.array(labels, np.int32), None, classes)


def _images(folder: Path, base: Path) -> Iterator[str]:
    """Image files below `folder`, which is `base` or in it, in sorted order and relative to `folder`.

    Links to folders are followed, unless one leads back to a folder on the way from `base` down to it: InputError.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    others = []
    way = [(base, os.stat(base))]
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if Path(place) != base:
            _go_down(way, Path(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            path = os.path.relpath(os.path.join(place, file), folder)
            if file.lower().endswith(IMAGE_NAMES) and not file.startswith("."):
                yield path
            elif not file.startswith(".") and file != LABELS_NAME:
                others.append(path)
    if others:
        _note(f"{folder}: passed over {len(others)} files that are not named as images, e.g. {others[0]}")


def _go_down(way: list[tuple[Path, os.stat_result]], folder: Path) -> None:
    """Make `way` lead down to `folder`. Raises InputError where a folder is on it twice: os.walk itself goes round
    such a loop until the system refuses the path, 40 links later, and every image is a row each time.
    """
    while way[-1][0] != folder.parent:
        way.pop()
    found = os.stat(folder)
    for above, known in way:
        if os.path.samestat(known, found):
            link = next((place for place in (folder, *folder.parents) if place.is_symlink()), folder)
            raise InputError(
                f"{link}: leads back to {above}, whose images would be taken again and again; remove this link "
                "(links to other folders are followed)"
            )
    way.append((folder, found))


def _root(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    inner = folder / "images"
    return (
        inner if _folders(folder) == ["images"] and _folders(inner) and not (folder / LABELS_NAME).exists() else folder
    )


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _choose(folder: Path, split: str | None, splits: Sequence[str]) -> str:
    if split is None:
        return "train" if "train" in splits else splits[0]
    if split not in splits:
        raise InputError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
    return split


def _note(text: str) -> None:
    say(f"note: {text}", to=sys.stderr)
