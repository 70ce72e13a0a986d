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
from pretrain.engine.distributed import together
from pretrain.errors import InputError
from pretrain.model.initialization import initialize
from pretrain.model.positions import resize_positions
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer, load_tensors
from pretrain.weights.load import Weights, agreed, load_weights

PIXEL_SIDE = 32  # pixels a side, at the most, of the pixel baseline


@dataclass(frozen=True)
class Entry:
    """WEIGHTS to be scored. `spec`: the network as run here; `trained_size`: the pixels it was saved for."""

    id: str
    path: Path
    averaged: bool  # their Polyak average
    source: Path
    sha256: str
    step: int | None
    spec: ViTSpec
    trained_size: int


@dataclass(frozen=True)
class Subject:
    """Something that turns images into features.

    features: name in the report → layer of the module's output. identity: what fixes the module. build: makes
    it, on the CPU.
    """

    features: dict[str, str]
    identity: dict[str, Any]
    build: Callable[[], nn.Module]


def open_entries(paths: Sequence[str | Path], image_size: int | None, *, averaged: bool = False) -> list[Entry]:
    """Read every WEIGHTS once, so that a fault in the last is found before the first is run.

    An id is the last part of the path, or the whole path where two share it. `averaged`: take their Polyak averages.
    Collective, and the same on every rank. Raises InputError: no such weights, twice the same path, a network that
    cannot be run at `image_size`.
    """
    given = [Path(path) for path in paths]
    if len({path.resolve() for path in given}) < len(given):
        raise InputError(f"--init: {' '.join(map(str, given))}: the same weights twice; give each once")
    names = [path.resolve().name + ("-averaged" if averaged else "") for path in given]
    sources = [agreed(path) for path in given]

    def entry(path: Path, name: str, source: Path) -> Entry:
        weights = load_weights(source, averaged=averaged)
        return Entry(
            id=name if names.count(name) == 1 else str(path),
            path=path,
            source=weights.source,
            averaged=averaged,
            sha256=weights.sha256,
            step=weights.step,
            spec=replace(weights.spec, image_size=image_size or weights.spec.image_size, dropout=0.0),
            trained_size=weights.spec.image_size,
        )

    return together(lambda: [entry(*each) for each in zip(given, names, sources, strict=True)])


def subjects(entry: Entry, features: Sequence[str], seed: int) -> list[Subject]:
    """The network of `entry`, its untrained twin (of `seed`), the pixels: those that `features` names.

    Raises InputError where nothing is left, because the network has none of the layers.
    """
    spec = entry.spec
    layers = [layer for layer in features if layer in LAYERS and has_layer(spec, layer)]
    identity = {"spec": asdict(spec)}
    found = []
    if layers:
        found.append(
            Subject(
                {layer: layer for layer in layers},
                {**identity, "weights": entry.sha256},
                lambda: frozen(entry),
            )
        )
    if "untrained" in features:
        twin = Subject({"untrained": representation(spec)}, {**identity, "seed": seed}, lambda: untrained(spec, seed))
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
    """Of a network's features the one that speaks for it: after tanh, else the class token; None of baselines."""
    found = set(features)
    return next((layer for layer in ("tanh", "cls", "mean", "pre_tanh") if layer in found), None)


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
    load_tensors(model, resized(weights, entry.spec), where=f"weights {entry.source}")
    return model


def resized(weights: Weights, spec: ViTSpec) -> dict[str, Tensor]:
    """The tensors of `weights` with learned positions for the grid of `spec`."""
    tensors = dict(weights.tensors)
    if "position_embedding" in tensors:
        tensors["position_embedding"] = resize_positions(
            tensors["position_embedding"], (spec.grid, spec.grid), class_slot=spec.pool == "cls"
        )
    return tensors


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
