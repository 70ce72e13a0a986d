"""Image folders as users have them: a folder per class, folders per split, label lists.

    DIR/cat/1.jpg                   no splits: one split, "all"
    DIR/train/cat/1.jpg             splits: sub-folders called train, val, test or trainval, in any usual spelling
                                    (Training, valid, test_set); others beside them hold no images
    DIR/images/…                    either of them, one folder down

The classes are the sorted names of the class folders of all splits together, so that a label means the same in each.
Images lie at any depth below their class folder. Class folders sorted by first letter (a/abbey/…) are recognised where
a list of classes names them, as in Places365 and SUN. A folder without images is no class. Everything else is refused:
classes are not guessed. With `--split all` each folder of DIR is a class, whatever its name and content.

With a file `labels.json` in DIR or in the split's folder, images have lists of labels and folders mean nothing: see
labelsfile.py.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from pretrain.datasets.dataset import Dataset
from pretrain.datasets.files import (
    file_dataset,
    folders,
    image_folders,
    images,
    loose_images,
    note,
    read_text,
    shown,
)
from pretrain.datasets.labelsfile import LABELS_NAME, with_lists
from pretrain.datasets.splits import bears_split_name, choose, find_splits, is_holder, is_no_class, split_name
from pretrain.errors import InputError
from pretrain.files import exists, is_folder
from pretrain.storage.filekind import IMAGE_ENDINGS

_LETTER_LISTS = ("ClassName.txt", "categories_places365.txt")  # SUN's, Places365's: "/a/abbey", and more, a line
_LONGEST_LINE = 10_000


def open_folder(folder: Path, split: str | None = None) -> Dataset:
    """The data set of an image folder. The split defaults to "train" where the folder has splits.

    Raises InputError for a folder without images, for ambiguous sub-folders, for an unknown split, and for lists that
    do not match the files.
    """
    root = _root(folder)
    splits = find_splits(root, split)
    chosen = choose(folder, split, splits)
    base = splits[chosen]
    for path in (base, root):
        if exists(path / LABELS_NAME):
            return with_lists(folder.resolve().name, chosen, base, path / LABELS_NAME)
    every_folder = split == "all"
    found = {name: classes_of(path, every_folder=every_folder) for name, path in splits.items()}
    if not every_folder:
        _refuse_splits(splits, found)
    classes = number_classes(splits, found, chosen)
    return class_folders(folder.resolve().name, chosen, base, classes, whatever_inside=every_folder)


def number_classes(splits: Mapping[str, Path], found: Mapping[str, Mapping[str, Path]], chosen: str) -> dict[str, Path]:
    """The classes of all splits together, in the order of their labels, and the folder of each in the chosen split.

    `found` holds the classes of each split; a split without labels has none. Raises InputError where the chosen split
    has none, and where a split shares no class with the others.
    """
    base = splits[chosen]
    if not found[chosen]:
        raise InputError(_without_classes(base, base if chosen == "all" else base.parent))
    for name, classes in found.items():
        others = {other for split, theirs in found.items() if split != name for other in theirs}
        if classes and others and not others & set(classes):
            raise InputError(
                f"{splits[name]}: shares no class with the other splits ({shown(classes)}; there {shown(others)}), "
                f"and classes are numbered over all splits: call them alike, or give {base} by itself"
            )
    names = sorted({name for classes in found.values() for name in classes})
    _refuse_spellings(splits, found)
    if found.get("train") and (more := set(names) - set(found["train"])):
        note(f"{splits['train']}: {len(more)} of {len(names)} classes are in other splits only: {shown(more)}")
    return {name: found[chosen].get(name, Path(name)) for name in names}


def _refuse_spellings(splits: Mapping[str, Path], found: Mapping[str, Mapping[str, Path]]) -> None:
    """Raise InputError where one class is spelt in two ways: in case by two splits, in spaces or as Unicode by one."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFKC", name).casefold().strip()

    spelt: dict[str, tuple[str, Path]] = {}
    for split, classes in found.items():
        looks: dict[str, str] = {}
        for name in classes:
            other = looks.setdefault(unicodedata.normalize("NFC", name).strip(), name)
            if other != name:
                raise InputError(
                    f"{splits[split]}: classes {other!a} and {name!a} look alike; one folder would be right"
                )
        for name in classes:
            other, there = spelt.get(plain(name), (name, splits[split]))
            if other not in classes and not any({name, other} <= set(both) for both in found.values()):
                raise InputError(f"{splits[split]}: class {name!a} is called {other!a} in {there}; call it alike")
        spelt.update({plain(name): (name, splits[split]) for name in classes})


def _refuse_splits(splits: Mapping[str, Path], found: Mapping[str, Mapping[str, Path]]) -> None:
    """Raise InputError where a folder among the classes has a split's name, unless it holds images itself and is a
    class in other splits too, or in the split of that name (train/train/1.jpg).
    """
    for split, classes in found.items():
        for name in filter(bears_split_name, classes):
            path = splits[split] / classes[name]
            alike = split_name(name) in (None, split) or sum(name in others for others in found.values()) > 1
            if not (alike and loose_images(path)):
                raise InputError(
                    f"{path}: a folder called like a split, among class folders ({shown(classes)}); "
                    "DIR/<split>/<class>/*.jpg would be right (a class of such a name holds images itself, in every "
                    "split)"
                )


def class_folders(
    name: str, split: str, base: Path, classes: Mapping[str, Path], *, whatever_inside: bool = False
) -> Dataset:
    """One folder a class, images at any depth below; rows sorted by class, then by path.

    Raises InputError where class folders hold folders that may be splits or classes, unless `whatever_inside`.
    """
    files: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    others: list[str] = []
    inside: dict[str, set[str]] = {}  # class -> its folders that hold images; "" is the class folder itself
    for label, (called, below) in enumerate(classes.items()):
        found = list(images(base / below, base, others)) if is_folder(base / below) else []
        files += [os.path.join(below, file) for file in found]
        labels += [label] * len(found)
        if found:
            inside[called] = {os.path.dirname(file) for file in found}
        else:
            empty.append(called)
    if not whatever_inside:
        _refuse_inside(base, classes, inside)
    inner = {os.path.join(classes[name], path.split(os.sep)[0]) for name, paths in inside.items() for path in paths}
    if beside := set(folders(base)) - {below.parts[0] for below in classes.values()}:
        note(f"{base}: passed over {len(beside)} folders, without images or no classes: {shown(beside)}")
    if len(inner) > len(classes) - len(empty) and not inner & {os.path.join(below, "") for below in classes.values()}:
        note(f"{base}: its own folders are the classes ({shown(classes)}), not the folders in these ({shown(inner)})")
    if empty:
        note(f"{base}: {len(empty)} of {len(classes)} classes have no images here, e.g. {empty[0]}")
    if others:
        note(f"{base}: passed over {len(others)} files that are not named as images, e.g. {others[0]}")
    if loose := loose_images(base):
        note(f"{base}: passed over {len(loose)} images that lie in no class folder, e.g. {loose[0]}")
    if len(classes) == 1:
        note(f"{base}: one class only, {next(iter(classes))}")
    if all(called.isdecimal() for called in classes) and any(int(c) != n for n, c in enumerate(classes)):
        odd = next((n, called) for n, called in enumerate(classes) if int(called) != n)
        note(f"{base}: classes are numbered in the order of their names as text: label {odd[0]} is class {odd[1]!r}")
    return file_dataset(name, split, base, files, labels, list(classes))


def _refuse_inside(base: Path, classes: Mapping[str, Path], inside: Mapping[str, Set[str]]) -> None:
    """Raise InputError where folders in class folders have names of splits, names that are no class's beside others,
    or the same names in most classes: these may be the classes, or further pictures of one kind (masks).
    """
    mend = (
        f"DIR/<class>/*.jpg or DIR/<split>/<class>/*.jpg would be right; {base} given with --split all takes its own "
        "folders as classes, with all they hold"
    )
    counts: Counter[str] = Counter()
    for called, paths in inside.items():
        path = base / classes[called]
        if odd := sorted(path for path in paths if any(map(split_name, path.split(os.sep)))):
            raise InputError(f"{path / odd[0]}: a split's name inside the class folder {path}; {mend}")
        first = {path.split(os.sep)[0] for path in paths}
        if len(first) == 1 and first <= paths:  # its own images, or one folder that holds them
            continue
        if odd := sorted(filter(is_no_class, first)):
            beside = shown(f"{name}/" if name else "images" for name in first - {odd[0]}) or "folders in it"
            raise InputError(
                f"{path / odd[0]}: called like no class, with {beside}, in the class folder {path}; {mend}"
            )
        if odd := sorted(first & (set(classes) - {called})):
            raise InputError(f"{path / odd[0]}: a folder called like a class, inside another class folder; {mend}")
        counts.update(first - {""})
    if len(inside) > 1 and (same := [name for name, count in counts.items() if 2 * count > len(inside)]):
        raise InputError(
            f"{base}: {shown(f'{called}/' for called in inside)} hold folders of the same names ({shown(same)}): these "
            f"may be the classes, or one of several kinds of pictures; {mend}"
        )


def _root(folder: Path) -> Path:
    """The folder of the classes or splits: `folder`, or the one that holds the images in it."""
    if not is_folder(folder):
        raise InputError(f"{folder}: no such folder")
    names = image_folders(folder)
    if exists(folder / LABELS_NAME) or len(names) != 1 or not is_holder(names[0]):
        return folder
    inner = folder / names[0]
    if not image_folders(inner):
        return folder
    if beside := set(folders(folder)) - {inner.name}:
        note(f"{inner}: holds the images; passed over {shown(beside)}")
    return inner


def classes_of(folder: Path, *, every_folder: bool = False) -> dict[str, Path]:
    """Class names and their folders, relative to `folder`; empty where its images have no labels."""
    names = image_folders(folder)
    if every_folder:
        return {name: Path(name) for name in names}
    if letters := _letters(folder, names):
        return letters
    holders = _holders(folder, names)
    odd = [name for name in names if name in holders or is_no_class(name)]
    if odd and len(names) > max(1, len(holders)):
        raise InputError(
            f"{folder}: holds {odd[0]}/, which is called like no class, and {shown(set(names) - {odd[0]})} beside, "
            f"with images in each; class folders alone would be right, or a {LABELS_NAME}; {folder} given with --split "
            "all takes each folder as a class"
        )
    if len(names) == 1 and not loose_images(folder / names[0]):
        inner = folder / names[0]
        below = image_folders(inner)
        if holders and not any(map(split_name, below)):
            return {name: Path(inner.name, path) for name, path in classes_of(inner).items()}
        raise InputError(
            f"{folder}: holds one folder, {inner.name}/, with folders in it ({shown(below)}): if these are the "
            f"classes or splits, give {inner}"
        )
    return {} if holders else {name: Path(name) for name in names}


def _holders(folder: Path, names: Sequence[str]) -> list[str]:
    """Folders that only hold images: by their name, or an archive's folder in a folder of the same name."""
    return [name for name in names if is_holder(name) or names == [folder.name]]


def _letters(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Classes in folders by their first letter: a/abbey, a/apartment_building/outdoor, b/bakery/shop.

    Raises InputError where no list of classes is found, and for a class that it does not name.
    """
    if not names or any(len(name) > 1 or loose_images(folder / name) for name in names):
        return {}
    found: dict[str, Path] = {}
    for letter in names:
        below = image_folders(folder / letter)
        if any(not name.lower().startswith(letter.lower()) for name in below):
            return {}
        for name in below:
            inner = Path(letter, name)
            if loose_images(folder / inner):
                found[name] = inner
            else:
                found.update({f"{name}/{kind}": inner / kind for kind in image_folders(folder / inner)})
    lists = (where / name for where in (folder, folder.parent) for name in _LETTER_LISTS)
    listing = next((path for path in lists if exists(path)), None)
    if listing is None:
        raise InputError(
            f"{folder}: holds folders of one letter ({shown(names)}) with folders in them ({shown(found)}), and either "
            f"may be the classes; {folder} given with --split all takes the letters, a list of classes {folder}/"
            f"{_LETTER_LISTS[0]} (/{next(iter(found.values()))}, one a line) what they hold"
        )
    listed = {line.split()[0].strip("/") for line in read_text(listing).splitlines() if line.strip()}
    if missing := [name for name, inner in found.items() if inner.as_posix() not in listed]:
        raise InputError(f"{listing}: does not have {shown(missing)}, which {folder} has")
    return found


def _without_classes(base: Path, root: Path) -> str:
    """The error of a folder that has no images, or none with labels."""
    path = base
    found = loose_images(base)
    if not found:
        holder = next(iter(_holders(base, image_folders(base))), None)
        path = base if holder is None else base / holder
        found = list(images(path, base)) if holder else []
    right = f"DIR/<class>/*.jpg or DIR/<split>/<class>/*.jpg would be right, or a {LABELS_NAME} that lists labels"
    if not found:
        others: list[str] = []
        list(images(base, base, others))
        kinds = f", but {len(others):,} other files ({shown(others)}; images are called {', '.join(IMAGE_ENDINGS)})"
        return f"{base}: no images{kinds if others else ''}: no class folders that hold any; {right}"
    lists = [listing for where in {base: 0, root: 0} for listing in sorted(where.glob("*.csv"))]
    may = "".join(f"; {listing} may ({_columns(listing)})" for listing in lists[:3])
    return (
        f"{path}: {len(found):,} images ({shown(found)}) and no class folders: nothing here says what they show{may}; "
        f"{right}"
    )


def _columns(listing: Path) -> str:
    try:
        with open(listing, encoding="utf-8-sig", newline="") as lines:
            first = next(csv.reader([lines.readline(_LONGEST_LINE)]), [])
    except (OSError, ValueError, csv.Error):
        return "not read"
    return "columns " + ", ".join(first[:5]) + (", …" if len(first) > 5 else "")
