"""Features kept in files, so that another probe, or the same command again, need not compute them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewshot import features
from fewshot.config import FewshotConfig
from fewshot.features import (
    IMAGES,
    PIXEL_SIDE,
    Extraction,
    Layer,
    Source,
    count_repeated,
    extract,
    layers_of,
    missing_block,
    widths,
)
from fewshot.task import Splits
from pretrain import files
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.index.index import Index, Shard
from pretrain.index.indexfile import etag_of
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer
from pretrain.ranks.collectives import World, on_main, together
from pretrain.storage.retry import Timeouts
from pretrain.storage.store import is_remote, stat
from pretrain.training.setup import check_index
from pretrain.weights.networks import Network
from pretrain.weights.weights import Weights
from pretrain.workers import in_threads

FOLDER = "features"  # in the output folder; may be removed at any time
_SOURCES: tuple[Source, ...] = ("trained", "untrained", "none")  # also the order of features in a report
_CODE = files.sha256(Path(features.__file__))  # what a layer computes is what its entry in the table says
FORMAT = 4  # also to be raised when features of the same weights and images come out differently
_ASKED_AT_ONCE = 32
# What numpy raises for a file that is no .npz, is cut off, damaged, encrypted, or holds pickles: zipfile's RuntimeError
# is for a password and for the kinds of archive that it does not read.
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, KeyError, RuntimeError)


@dataclass(frozen=True)
class FeatureSet:
    """One feature of the support images [n, d], whose ids ascend, and of the query images [m, d] in order of id."""

    support_ids: NDArray[np.int64]
    support: NDArray[np.floating[Any]]
    query: NDArray[np.floating[Any]]

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """The support features of `ids`, in their order."""
        return self.support[np.searchsorted(self.support_ids, ids)]


@dataclass(frozen=True)
class NetworkFeatures:
    """The features of one network, by name: the file that holds each, and how many numbers it has for an image."""

    network: Network
    sha256: str  # of the weights
    files: dict[str, Path]
    widths: dict[str, int]


def find_baselines(networks: Sequence[NetworkFeatures]) -> list[dict[str, str]]:
    """For each network, its baselines by name, and the id of the network under which the rows of each stand.

    Networks may share a baseline: the pixels of one image size, or the same network untrained. It is scored once, and
    its rows stand under the first of them.
    """
    owners: dict[Path, str] = {}
    return [
        {
            layer.name: owners.setdefault(one.files[layer.name], one.network.id)
            for layer in layers_of(list(one.files))
            if layer.baseline
        }
        for one in networks
    ]


class FeatureCache:
    """The feature files of a task's images in one folder.

    A file is named by a hash of what fixes its features: weights, image size, images, arithmetic, and the code of the
    layers, to which users add. It holds the union of the support sets and the whole query set, so neither ImageNet's
    other million images nor a second run cost time.
    """

    def __init__(self, config: FewshotConfig, splits: Splits, folder: Path, world: World) -> None:
        """Check the indices and ask what their shards hold now. Collective.

        Args:
            splits: those of a task, or "query" alone.

        Raises:
            InputError: an index is damaged or differs among nodes (StorageError: a server does not answer).
        """
        self._config, self._folder, self._world = config, folder, world
        self._timeouts = config.data.timeouts()
        self._splits = splits
        self._shards_checked = False
        self._told: set[Path] = set()
        for split, (index, _) in self._splits.items():
            check_index(index, f"data.{split}", world, self._timeouts, files=False)
        self._images, self._times = on_main(
            lambda: (
                {split: content(index, ids, self._timeouts) for split, (index, ids) in self._splits.items()},
                {split: write_times(index) for split, (index, _) in self._splits.items()},
            )
        )

    def features(self, network: Network, weights: Weights | None = None) -> NetworkFeatures:
        """The features of a network that the config names and the network has; computed where there is no file of them.

        Reads the weights, where they are not given, once on each rank. Collective.

        Raises:
            InputError: the network has none of the features, or not a block of them; a shard is not in place, or an
                image cannot be read (StorageError: for now). The same on every rank.
        """
        present = self._widths(network)
        weights = weights or together(lambda: network.source.read(network.averaged))
        found: dict[str, Path] = {}
        for source in _SOURCES:
            layers = [layer for layer in layers_of(list(present)) if layer.network == source]
            if not layers:
                continue
            names = [layer.name for layer in layers]
            file = self._file(network, source, weights.sha256, names)
            title = f"{network.id}: {' '.join(names)}"
            if on_main(partial(is_current, file, self._times)):
                if file not in self._told:  # networks may share baselines
                    self._say(f"{title}: already in {self._folder}")
            else:
                began = time.monotonic()
                self._check_shards()
                self._compute(network, source, weights, layers, file)
                count = " and ".join(f"{len(ids):,} {split}" for split, (_, ids) in self._splits.items())
                self._say(f"{title}: {count} images, {time.monotonic() - began:.1f} s")
            self._told.add(file)
            found.update(dict.fromkeys(names, file))
        return NetworkFeatures(network, weights.sha256, found, present)

    def check(self, networks: Sequence[Network]) -> None:
        """Refuse, before any features are computed, a network that has none of those that the config names, or not a
        block that it names.

        Raises:
            InputError: as `features`, on every rank.
        """
        for network in networks:
            self._widths(network)

    def _widths(self, network: Network) -> dict[str, int]:
        """The features of a network, in the order of their sources, and how many numbers each has for an image."""
        names, depth = self._config.fewshot.features, network.spec.layers
        for name in names:
            if missing_block(name, depth):
                raise InputError(
                    f"fewshot.features: {name}: the network of {network.source.path} has {depth} blocks; block1 to "
                    f"block{depth}, or from the end block-1 to block-{depth}, would be right"
                )
        ordered = sorted(layers_of(names), key=lambda layer: _SOURCES.index(layer.network))
        present = widths(network.spec, [layer.name for layer in ordered])
        if not present:
            raise InputError(
                f"fewshot.features: {' '.join(names)}: the network of {network.path} has none of these (no "
                "representation head); cls or mean would be right"
            )
        return present

    def _check_shards(self) -> None:
        """Once, before anything is computed. Where all features are kept, the shards may be gone."""
        if not self._shards_checked:
            for split, (index, _) in self._splits.items():
                check_index(index, f"data.{split}", self._world, self._timeouts)
            self._shards_checked = True

    def _file(self, network: Network, source: Source, sha256: str, names: list[str]) -> Path:
        identity: dict[str, Any] = {"spec": asdict(network.spec), "dtype": str(network.dtype)}
        if source == "trained":
            identity["weights"] = sha256
        elif source == "untrained":
            identity["seed"] = self._config.seed
        else:
            spec = network.spec
            size = min(spec.image_size, PIXEL_SIDE)
            identity = {"pixels": size, "image_size": spec.image_size, "channels": spec.channels}
        arithmetic = {
            "batch": self._config.fewshot.batch,
            "device": self._world.device.type,
            "code": _CODE,
            "torch": version("torch"),
        }
        return feature_file(self._folder, {"subject": identity, "layers": names, "images": self._images, **arithmetic})

    def _compute(self, network: Network, source: Source, weights: Weights, layers: list[Layer], file: Path) -> None:
        how = Extraction(
            network.spec, self._config.fewshot.batch, self._config.data.workers, self._world, self._timeouts
        )
        model = None
        if source == "trained":
            model = together(lambda: weights.model(network.spec.image_size))
        elif source == "untrained":
            model = VisionTransformer(network.spec)
            initialize(model, self._config.seed)
        if model is not None:
            model = model.to(network.dtype).to(self._world.device)
        arrays = {f"{split}_times": at for split, at in self._times.items()}
        if "support" in self._splits:
            arrays["support_ids"] = self._splits["support"][1]
        for split, (index, ids) in self._splits.items():
            computed = extract(model, layers, index, ids, how, doing=f"features of data.{split}")
            arrays.update({f"{split}_{name}": values for name, values in (computed or {}).items()})
        together(lambda: write_features(file, arrays) if self._world.main else None)

    def _say(self, text: str) -> None:
        if self._world.main:
            say(text)


def feature_file(folder: Path, what: Mapping[str, Any]) -> Path:
    """Where features that `what` fixes are kept."""
    text = json.dumps({"format": FORMAT, **what}, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def content(index: Index, ids: NDArray[np.int64] | None = None, timeouts: Timeouts | None = None) -> str:
    """sha256 (hex) of what fixes the images of `ids` (default: all), as far as is known without reading them.

    The index's hash says what was indexed. Whether a shard is still that: readers compare its etag where one is
    recorded; else what its server says of it now counts, and of a local one `write_times`. Raises InputError where a
    server is asked and has no answer, after `timeouts`.
    """
    digest = hashlib.sha256(index.hash.encode())
    for shard in in_threads(lambda shard, _: _version(shard, timeouts), list(index.shards), _ASKED_AT_ONCE):
        digest.update(shard.encode())
    digest.update(b"all" if ids is None else ids.astype("<i8").tobytes())
    return digest.hexdigest()


def write_times(index: Index) -> NDArray[np.int64]:
    """When each shard was written to last, in ns, int64 [shards]; 0 for one at a URL, or not in place."""
    times = in_threads(lambda shard, _: _write_time(shard), list(index.shards), _ASKED_AT_ONCE)
    return np.fromiter(times, np.int64)


def is_current(path: Path, times: Mapping[str, NDArray[np.int64]]) -> bool:
    """Whether `path` holds features of the shards as they are now, by split and `write_times`.

    A shard that is not in place any more counts as unchanged: it may be gone once the features are computed.
    """
    if not files.is_file(path):
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return all(bool(((now == file[f"{split}_times"]) | (now == 0)).all()) for split, now in times.items())
    except UNREADABLE:
        return True  # `read_feature` reports it


def write_features(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as .npz, whole or not at all."""
    save: Callable[..., None] = np.savez  # numpy's releases type its keywords, here the arrays' names, differently
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        save(file, **arrays)


def read_feature(path: Path, name: str, where: str) -> FeatureSet:
    """One feature that `write_features` has written. `where` says in messages whose features they are.

    Raises InputError: the file is damaged, or features are not finite.
    """
    ids, support, query = _read(path, "support_ids", f"support_{name}", f"query_{name}")
    return FeatureSet(ids, _finite(support, f"{where}: {name}", "support"), _finite(query, f"{where}: {name}", "query"))


def read_query(path: Path, name: str, where: str) -> NDArray[Any]:
    """One feature of the query images alone [m, d], as `read_feature`."""
    (query,) = _read(path, f"query_{name}")
    return _finite(query, f"{where}: {name}", "query")


def _finite(values: NDArray[Any], what: str, split: str) -> NDArray[Any]:
    """`values`, all rows of which are finite; else an InputError."""
    if lost := count_not_finite(values):
        raise InputError(
            f"{what} is not finite for {lost} of {len(values)} {split} images; these weights have diverged, give those "
            "of an earlier step"
        )
    return values


def repeated_images(path: Path) -> int:
    """How many of the query images in a feature file are among its support images. Raises InputError: it is damaged."""
    return count_repeated(*_read(path, f"query_{IMAGES}", f"support_{IMAGES}"))


def _read(path: Path, *names: str) -> list[NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except UNREADABLE as error:
        raise unreadable(path, "cannot be read", error, "; remove the file to compute them anew") from None


def unreadable(path: Path, what: str, error: Exception, mend: str = "") -> InputError:
    """What to raise where numpy raised `error` for a file of features."""
    if isinstance(error, OSError) and error.errno:  # numpy raises OSErrors of its own, without a number
        return files.failure(path, error)
    return InputError(f"features {path}: {what}: {error}{mend}")


def count_not_finite(x: NDArray[Any]) -> int:
    """How many rows hold a NaN or an infinity."""
    return int((~np.isfinite(x).all(axis=1)).sum())


def _version(shard: Shard, timeouts: Timeouts | None) -> str:
    if etag_of(shard.digest) or not is_remote(shard.url):
        return shard.digest
    found = stat(shard.url, timeouts)
    return f"{found.size} {found.etag or found.modified}"


def _write_time(shard: Shard) -> int:
    if is_remote(shard.url):
        return 0
    try:
        return os.stat(shard.url).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return 0
