"""Published sets as their archives unpack, with labels in lists or in folders of a special layout.

Tiny-ImageNet      train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt
ImageNet           train/<wnid>/*.JPEG, and val/<wnid>/*.JPEG or a flat val/ beside the devkit or Kaggle's solution;
                   Kaggle's own tree ILSVRC/Data/CLS-LOC
Oxford Pets        images/*.jpg, annotations/trainval.txt and test.txt
Oxford Flowers     jpg/*.jpg, imagelabels.mat and setid.mat
Places365          data_256*/<letter>/<class>/*.jpg, val_256/*.jpg, categories_places365.txt, places365_val.txt
iNaturalist        2017 to 2019: train_val20…/<super category>/<category>/*.jpg for both splits, train20….json and
                   val20….json (that of 2021 is an image folder)
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pretrain.datasets.dataset import Dataset
from pretrain.datasets.files import file_dataset, folders, image_folders, images, loose_images, note, read_text, shown
from pretrain.datasets.folder import class_folders, classes_of, number_classes
from pretrain.datasets.splits import choose, name_splits, split_name
from pretrain.errors import InputError
from pretrain.files import exists, is_folder

_WNID = re.compile(r"n\d{8}")
_SOLUTION = "LOC_val_solution.csv"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_TINY_LIST = "val_annotations.txt"
_PLACES_CLASSES = "categories_places365.txt"
_PLACES = {"train": re.compile(r"data_(256|large)"), "val": re.compile(r"val_(256|large)")}
_INATURALIST = re.compile(r"train_val(20\d\d|_images)")
_INATURALIST_LIST = re.compile(r"(train|val)20\d\d\.json")

Row = TypeVar("Row")


def open_published(folder: Path, split: str | None) -> Dataset | None:
    """The data set in `folder`, if it is one of these. Raises InputError where it is one, but incomplete."""
    for recognised, opened in _LAYOUTS:
        if recognised(folder):
            return opened(folder, split)
    return None


# ImageNet


def open_imagenet(folder: Path, split: str | None = None) -> Dataset:
    """ImageNet, "train" (default) or "val". Classes are the sorted wnids of both splits' folders."""
    root = _kaggle(folder) or folder
    splits = _imagenet_splits(root)
    chosen = choose(folder, split, splits)
    base = splits[chosen]
    if not is_folder(base):
        hint = ""
        if any(folder.glob("ILSVRC2012_img_*.tar")):
            hint = f"; unpack the archives first: torchvision.datasets.ImageNet('{folder}', '{chosen}') does"
        raise InputError(f"{base}: no such folder; ImageNet is {root}/train/<wnid>/*.JPEG and {root}/val/{hint}")
    if packed := next(base.glob("n*.tar"), None):
        raise InputError(f"{packed}: not unpacked; its images belong into {packed.with_suffix('')}/")
    found = {name: _wnids(path) for name, path in splits.items()}
    if found[chosen]:
        return class_folders("imagenet", chosen, base, number_classes(splits, found, chosen))
    if chosen == "train" or not found["train"]:
        raise InputError(
            f"{splits['train']}: no <wnid> folders with images, by which the classes are numbered; ImageNet is "
            f"{root}/train/<wnid>/*.JPEG and {root}/val/"
        )
    wanted, listing = _imagenet_list(folder, root, base)
    classes = list(found["train"])
    return _listed("imagenet", chosen, base, wanted, listing, classes, "train/", key=lambda file: Path(file).stem)


def _imagenet_splits(root: Path) -> dict[str, Path]:
    """The folders of train and val, in any spelling, or with the archives' names (ILSVRC2012_img_train)."""
    there = folders(root) if is_folder(root) else []
    found = {}
    for name in ("train", "val"):
        called = [other for other in there if split_name(other) == name or other.endswith(f"_{name}")]
        if name not in called and len(called) > 1:
            raise InputError(f"{root}: {called[0]}/ and {called[1]}/ would both be {name}/; keep one here")
        found[name] = root / (name if name in called or not called else called[0])
    return found


def _wnids(folder: Path) -> dict[str, Path]:
    return {name: Path(name) for name in image_folders(folder) if _WNID.fullmatch(name)} if is_folder(folder) else {}


def _kaggle(folder: Path) -> Path | None:
    paths = (folder / "ILSVRC" / "Data" / "CLS-LOC", folder / "Data" / "CLS-LOC")
    return next((path for path in paths if is_folder(path)), None)


def _imagenet_list(folder: Path, root: Path, base: Path) -> tuple[dict[str, str], Path]:
    """The wnid of each file of a flat val/, and the list that gives it."""
    around = list(dict.fromkeys((folder, root, base, folder.parent)))
    solution = next((path / _SOLUTION for path in around if exists(path / _SOLUTION)), None)
    if solution:
        return _solution(solution), solution
    kits = [path / kit for path in around for kit in ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")]
    truth = next((kit / _TRUTH for kit in kits if exists(kit / _TRUTH)), None)
    if truth:
        return {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(_devkit(truth), 1)}, truth
    files = list(images(base, base))
    raise InputError(
        f"{base}: no <wnid> folders, and nothing that gives its {len(files):,} images ({shown(files)}) their labels; "
        f"sort them into {base}/<wnid>/, unpack ILSVRC2012_devkit_t12.tar.gz in {folder}, or keep Kaggle's {_SOLUTION} "
        "there"
    )


def _solution(path: Path) -> dict[str, str]:
    """Kaggle's: the first word of a row's PredictionString is the wnid."""
    try:
        rows = list(csv.DictReader(read_text(path).splitlines()))
        return _once(((row["ImageId"], row["PredictionString"].split()[0]) for row in rows), path)
    except (KeyError, IndexError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{path}: not Kaggle's: a column ImageId, and a column PredictionString that begins with a wnid in "
            "each row, would be right"
        ) from error


def _devkit(truth: Path) -> list[str]:
    """The wnids of the validation images in order: their numbers, by the devkit's own numbering of the synsets."""
    meta = truth.with_name("meta.mat")
    if not exists(meta):
        raise InputError(
            f"{truth}: has numbers whose wnids stand in {meta}, which is not there; they are not the order of the wnids"
        )
    try:
        synsets = _mat(meta, "synsets").ravel()
        wnids = {int(synset["ILSVRC2012_ID"].item()): str(synset["WNID"].item()) for synset in synsets}
    except (ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{meta}: not the devkit's: synsets with ILSVRC2012_ID and WNID would be right") from error
    return _rows(truth, lambda words: wnids[int(words[0])], f"the number of a synset of {meta}")


# Tiny-ImageNet


def _open_tiny(folder: Path, split: str | None) -> Dataset:
    splits = {name: folder / name for name in ("train", "val") if is_folder(folder / name)}
    chosen = choose(folder, split, splits)
    found = {"train": classes_of(splits["train"]) if "train" in splits else {}}
    if chosen == "train":
        return class_folders(folder.resolve().name, chosen, splits["train"], number_classes(splits, found, chosen))
    wnids = read_text(folder / "wnids.txt").split() if exists(folder / "wnids.txt") else []
    classes = sorted(found["train"] or wnids)
    if not classes:
        raise InputError(f"{folder}: has neither train/<wnid>/ nor wnids.txt, by which the classes are numbered")
    listing = splits["val"] / _TINY_LIST
    labels = _once(_rows(listing, lambda words: (words[0], words[1]), "a file and its wnid"), listing)
    return _listed(folder.resolve().name, chosen, splits["val"] / "images", labels, listing, classes, "train/")


# Oxford Flowers-102 and Oxford-IIIT Pets


def read_flowers(folder: Path, split: str | None) -> Dataset:
    """Oxford Flowers-102: jpg/image_00001.jpg …, imagelabels.mat and setid.mat, counted from 1. Splits train (the
    default), val, test.
    """
    from torchvision.datasets import Flowers102

    sets = {"train": "trnid", "val": "valid", "test": "tstid"}
    chosen = choose(folder, split, {name: folder for name in sets})
    numbers = _mat(folder / "setid.mat", sets[chosen]).ravel().astype(np.int64)
    labels = _mat(folder / "imagelabels.mat", "labels").ravel()
    if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= len(labels):
        raise InputError(f"{folder}/setid.mat: names images up to {numbers.max()}; imagelabels.mat has {len(labels)}")
    files = [f"image_{number:05d}.jpg" for number in numbers.tolist()]
    targets = labels[numbers - 1].astype(np.int32) - 1
    classes = getattr(Flowers102, "classes", None)  # older versions of torchvision lack them
    return file_dataset("flowers", chosen, folder / "jpg", files, targets, classes)


def read_pets(folder: Path, split: str | None) -> Dataset:
    """Oxford-IIIT Pets: images/*.jpg and annotations/<split>.txt, "name class …" with classes from 1. Splits trainval
    (the default), test.
    """
    lists = {name: folder / "annotations" / f"{name}.txt" for name in ("trainval", "test")}
    chosen = choose(folder, split, lists)
    rows: dict[str, list[tuple[str, int]]] = {}
    breeds: dict[int, str] = {}
    for name, listing in lists.items():
        if name != chosen and not exists(listing):
            continue
        rows[name] = _rows(listing, lambda words: (words[0], int(words[1]) - 1), "a name and the number of its class")
        for file, label in rows[name]:
            breed = file.rpartition("_")[0].replace("_", " ")
            if breeds.setdefault(label, breed) != breed:
                raise InputError(f"{listing}: class {label + 1} is both {breeds[label]!r} and {breed!r}")
    if sorted(breeds) != list(range(len(breeds))):
        raise InputError(
            f"{folder}/annotations: classes {shown(map(str, breeds))}; numbers from 1 without a gap are right"
        )
    files = [f"{file}.jpg" for file, _ in rows[chosen]]
    labels = [label for _, label in rows[chosen]]
    return file_dataset("pets", chosen, folder / "images", files, labels, [breeds[n] for n in range(len(breeds))])


# Places365


def _open_places(folder: Path, split: str | None) -> Dataset:
    split_of = {inner: name for name, called in _PLACES.items() for inner in folders(folder) if called.match(inner)}
    splits = name_splits(folder, split_of, split or "train")
    chosen = choose(folder, split, splits)
    base = splits[chosen]
    listing = folder / _PLACES_CLASSES
    numbered = _numbers(listing)
    order = [path.lstrip("/") for path in sorted(numbered, key=lambda path: numbered[path])]
    classes = [path.partition("/")[2] for path in order]
    if sorted(numbered.values()) != list(range(len(order))) or len(set(classes)) < len(order):
        raise InputError(f"{listing}: /<letter>/<class> and its number a line, each class once, would be right")
    if split_of[base.name] == "train":
        classes_of(base)  # each is listed
        return class_folders("places365", chosen, base, dict(zip(classes, map(Path, order), strict=True)))
    truth = folder / "places365_val.txt"
    numbers = _numbers(truth)
    if wrong := [file for file, number in numbers.items() if number >= len(classes)]:
        raise InputError(
            f"{truth}: gives {wrong[0]} the number {numbers[wrong[0]]}; {_PLACES_CLASSES} has 0 … {len(classes) - 1}"
        )
    labels = {file: classes[number] for file, number in numbers.items()}
    return _listed("places365", chosen, base, labels, truth, classes, _PLACES_CLASSES)


def _numbers(listing: Path) -> dict[str, int]:
    """Names and numbers from 0, a pair a line."""

    def pair(words: list[str]) -> tuple[str, int]:
        name, number = words
        if not number.isdecimal():
            raise ValueError
        return name, int(number)

    return _once(_rows(listing, pair, "a name and a number from 0"), listing)


# iNaturalist


def _is_inaturalist(folder: Path) -> bool:
    """Whether its folder of images is there, with a year in its name or a list beside it."""
    found = [name for name in folders(folder) if _INATURALIST.fullmatch(name)]
    return bool(found) and (found != ["train_val_images"] or bool(_inaturalist_lists(folder)))


def _inaturalist_lists(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.iterdir() if _INATURALIST_LIST.fullmatch(path.name))
    return {path.name: str(split_name(path.stem)) for path in found}


def _open_inaturalist(folder: Path, split: str | None) -> Dataset:
    """Classes are the lists' categories, in the order of their numbers; the lists are in COCO's form."""
    splits = name_splits(folder, _inaturalist_lists(folder), split or "train")
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
        labels = [numbers[category] for _, category in rows]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{listing}: not iNaturalist's ({type(error).__name__}: {error}): images with id and file_name, "
            "annotations with image_id and category_id, categories with id and name would be right"
        ) from error
    files = [file for file, _ in rows]
    if twice := [file for file, after in itertools.pairwise(files) if file == after]:
        raise InputError(f"{listing}: has {twice[0]} twice; one category an image would be right")
    unique = len(set(names.values())) == len(names)
    classes = [names[category] if unique else f"{category} {names[category]}" for category in numbers]
    return file_dataset("inaturalist", chosen, folder, files, labels, classes)


# Lists of images


def _listed(
    name: str,
    split: str,
    base: Path,
    wanted: Mapping[str, str],
    listing: Path,
    classes: Sequence[str],
    classes_from: str,
    *,
    key: Callable[[str], str] = str,
) -> Dataset:
    """Images whose classes stand in a list, under `key` of a file. Raises InputError for an image that is not listed,
    or of another class than `classes`.
    """
    files = list(images(base, base))
    if unlisted := [file for file in files if key(file) not in wanted]:
        raise InputError(f"{listing}: does not have {shown(unlisted)}: {len(unlisted):,} images of {base}")
    numbers = {called: number for number, called in enumerate(classes)}
    if strange := [file for file in files if wanted[key(file)] not in numbers]:
        raise InputError(
            f"{listing}: {strange[0]} has class {wanted[key(strange[0])]}, which {classes_from} does not "
            f"({len(strange):,} such images)"
        )
    labels = [numbers[wanted[key(file)]] for file in files]
    if len(files) < len(wanted):
        note(f"{base}: {len(files):,} of the {len(wanted):,} images that {listing} lists")
    return file_dataset(name, split, base, files, labels, classes)


def _rows(listing: Path, parse: Callable[[list[str]], Row], form: str) -> list[Row]:
    """`parse` of each line's words. Raises InputError for a line that has not that `form`."""
    rows = []
    for line in read_text(listing).splitlines():
        if line.strip() and not line.startswith("#"):
            try:
                rows.append(parse(line.split()))
            except (LookupError, ValueError) as error:
                raise InputError(f"{listing}: found {line!r}; {form} a line would be right") from error
    return rows


def _once(pairs: Iterable[tuple[str, Any]], listing: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise InputError(f"{listing}: gives {name} both {found[name]} and {value}")
    return found


def _mat(path: Path, name: str) -> np.ndarray:
    if importlib.util.find_spec("scipy") is None:
        raise InputError(f"{path}: is read with scipy: pip install 'vit-foundry[quickstart]'")
    from scipy.io import loadmat

    try:
        return np.asarray(loadmat(path)[name])
    except Exception as error:  # a dozen kinds, none of them documented
        raise InputError(f"{path}: no MATLAB file with an array {name!r}: {error}") from error


def _is_imagenet(folder: Path) -> bool:
    """Whether it is Kaggle's tree, or has a flat val/, which is no image folder."""
    if _kaggle(folder):
        return True
    called = {inner: split_name(inner) for inner in folders(folder)}
    flat = any(name == "val" and _has_loose(folder / inner) for inner, name in called.items())
    return flat and any(name == "train" and _wnids(folder / inner) for inner, name in called.items())


def _has_loose(folder: Path) -> bool:
    return is_folder(folder) and bool(loose_images(folder))


def _is_places(folder: Path) -> bool:
    return exists(folder / _PLACES_CLASSES) and any(_PLACES["train"].match(name) for name in folders(folder))


_LAYOUTS: Sequence[tuple[Callable[[Path], bool], Callable[[Path, str | None], Dataset]]] = (
    (lambda folder: exists(folder / "val" / _TINY_LIST) and _has_loose(folder / "val" / "images"), _open_tiny),
    (lambda folder: exists(folder / "annotations" / "trainval.txt") and is_folder(folder / "images"), read_pets),
    (lambda folder: exists(folder / "setid.mat") and exists(folder / "imagelabels.mat"), read_flowers),
    (_is_places, _open_places),
    (_is_inaturalist, _open_inaturalist),
    (_is_imagenet, open_imagenet),
)
