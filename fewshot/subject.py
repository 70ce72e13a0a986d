"""Whose features are probed: a checkpoint's network, the same network untrained, and the bare pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewshot.config import LAYERS
from pretrain.errors import InputError
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer, load_tensors
from pretrain.ranks.collectives import together
from pretrain.record.folder import CHECKPOINTS
from pretrain.weights.fill import resize_to
from pretrain.weights.load import agreed, load_weights

PIXEL_SIDE = 32  # pixels a side, at the most, of the pixel baseline


@dataclass(frozen=True)
class Entry:
    """WEIGHTS to be scored. `spec`, `dtype`: the network as run here; `trained_size`: the pixels it was saved for;
    `trained_on`: the hash of the index, where that is known.
    """

    id: str
    path: Path
    averaged: bool  # their Polyak average
    source: Path
    sha256: str
    step: int | None
    spec: ViTSpec
    trained_size: int
    trained_on: str
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Subject:
    """Something that turns images into features.

    features: name in the report → layer of the module's output. identity: what fixes the module. build: makes
    it, on the CPU.
    """

    features: dict[str, str]
    identity: dict[str, Any]
    build: Callable[[], nn.Module]


def open_entries(
    paths: Sequence[str | Path],
    image_size: int | None,
    *,
    averaged: Sequence[bool] = (False,),
    dtype: torch.dtype = torch.float32,
) -> list[Entry]:
    """Read every WEIGHTS once, so that a fault in the last is found before the first is run.

    averaged: which weights of each path: as trained (False), their Polyak average (True), or both in turn.
    Collective, and the same on every rank. Raises InputError: no such weights, the same ones twice, a network that
    cannot be run at `image_size`.
    """
    given = [Path(path) for path in paths]
    sources = [agreed(path) for path in given]
    seen: dict[Path, Path] = {}
    for path, source in zip(given, sources, strict=True):
        first = seen.setdefault(source.resolve(), path)
        if first is not path:
            raise InputError(f"--init: {first} and {path}: the same weights twice, {source}; give each once")

    def entry(path: Path, source: Path, averaged: bool) -> Entry:
        weights = load_weights(source, averaged=averaged)
        return Entry(
            id="",
            path=path,
            source=weights.source,
            averaged=averaged,
            sha256=weights.sha256,
            step=weights.step,
            spec=replace(weights.spec, image_size=image_size or weights.spec.image_size, dropout=0.0),
            trained_size=weights.spec.image_size,
            trained_on=weights.trained_on,
            dtype=dtype,
        )

    found = together(
        lambda: [entry(path, source, kind) for path, source in zip(given, sources, strict=True) for kind in averaged]
    )
    return [replace(one, id=id) for one, id in zip(found, _ids(found), strict=True)]


def _ids(entries: Sequence[Entry]) -> list[str]:
    """What each is called in a report: its run, by as many last parts of the path as tell the runs apart, then the step
    where a checkpoint was named or the run has several, and whether it is the average.
    """
    runs = [run_of(one.source) for one in entries]
    depth = 1
    while depth < max(len(run.parts) for run in runs) and len({run.parts[-depth:] for run in runs}) < len(set(runs)):
        depth += 1
    ids = []
    for one, run in zip(entries, runs, strict=True):
        steps = {other.step for other, theirs in zip(entries, runs, strict=True) if theirs == run}
        said = one.step is not None and (len(steps) > 1 or one.path.resolve() == one.source.resolve())
        name = Path(*run.parts[-depth:]).as_posix().lstrip("/")
        ids.append(name + (f" step {one.step}" if said else "") + (" averaged" if one.averaged else ""))
    return ids


def run_of(source: Path) -> Path:
    """The run folder that the checkpoint `source` is of; of one that lies elsewhere, the folder that holds it."""
    folder = source.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def subjects(entry: Entry, features: Sequence[str], seed: int) -> list[Subject]:
    """The network of `entry`, its untrained twin (of `seed`), the pixels: those that `features` names.

    Raises InputError where nothing is left, because the network has none of the layers.
    """
    spec = entry.spec
    layers = [layer for layer in features if layer in LAYERS and has_layer(spec, layer)]
    identity = {"spec": asdict(spec), "dtype": str(entry.dtype)}
    found = []
    if layers:
        found.append(
            Subject(
                {layer: layer for layer in layers},
                {**identity, "weights": entry.sha256},
                lambda: frozen(entry).to(entry.dtype),
            )
        )
    if "untrained" in features:
        twin = Subject(
            {"untrained": representation(spec)},
            {**identity, "seed": seed},
            lambda: untrained(spec, seed).to(entry.dtype),
        )
        found.append(twin)
    if "pixels" in features:
        size = {
            "pixels": min(spec.image_size, PIXEL_SIDE),
            "image_size": spec.image_size,
            "channels": spec.channels,
        }
        found.append(Subject({"pixels": "pixels"}, size, Pixels))
    if not found:
        raise InputError(
            f"fewshot.features: {' '.join(features)}: the network of {entry.path} has none of these (no "
            "representation head); cls or mean would be right"
        )
    return found


def has_layer(spec: ViTSpec, layer: str) -> bool:
    """Whether the network has that feature layer."""
    return spec.representation_size is not None or layer not in ("tanh", "pre_tanh")


def representation(spec: ViTSpec) -> str:
    """The layer the protocol probes: after tanh where there is a representation head, else class token."""
    return "tanh" if spec.representation_size else "cls"


def headline(features: Iterable[str]) -> str | None:
    """Of a network's features the one that leads its report: the first that is no baseline; None of baselines."""
    return next((feature for feature in features if feature in LAYERS), None)


def width(spec: ViTSpec, feature: str) -> int:
    """How many numbers a feature of the report has for each image."""
    if feature == "pixels":
        return spec.channels * min(spec.image_size, PIXEL_SIDE) ** 2
    layer = representation(spec) if feature == "untrained" else feature
    return (spec.representation_size or 0) if layer in ("tanh", "pre_tanh") else spec.width


def frozen(entry: Entry) -> VisionTransformer:
    """The network of `entry` with its weights, learned positions resized to its image size.

    Raises InputError where the weights are not those that were opened.
    """
    weights = load_weights(entry.source, averaged=entry.averaged)
    if weights.sha256 != entry.sha256:
        raise InputError(f"weights {entry.source}: changed while they were being scored; start again")
    model = VisionTransformer(entry.spec)
    load_tensors(model, resize_to(weights.tensors, entry.spec), where=f"weights {entry.source}")
    return model


def untrained(spec: ViTSpec, seed: int) -> VisionTransformer:
    """The network freshly initialised."""
    model = VisionTransformer(spec)
    initialize(model, seed)
    return model


class Pixels(nn.Module):
    """The image itself as features: averaged down to PIXEL_SIDE a side where it is larger, row by row."""

    def forward(self, images: Tensor, features: bool = True) -> dict[str, Tensor]:
        """images [b, c, h, w] → {"pixels": [b, c·s·s]}, s = min(h, PIXEL_SIDE)."""
        side = min(images.shape[-1], PIXEL_SIDE)
        if side < images.shape[-1]:
            images = F.adaptive_avg_pool2d(images, side)
        return {"pixels": torch.flatten(images, 1)}
