"""The networks that are scored: the WEIGHTS of a command, and what a report calls them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.ranks.collectives import together
from pretrain.weights.load import FileSource, SavedSource, Source, choose, choose_every


@dataclass(frozen=True)
class Network:
    """A network to be scored: one WEIGHTS, raw or averaged, which is not read yet.

    Args:
        id: what a report calls it.
        run: what a report calls all that it has of the same run.
        path: as given.
        source: what it names.
        spec, dtype: the network as it is run here.
    """

    id: str
    path: str | Path
    source: Source
    averaged: bool
    spec: ViTSpec
    dtype: torch.dtype = torch.float32
    run: str = ""

    @property
    def trained_size(self) -> int:
        """Image size in pixels that the weights were trained at."""
        return self.source.spec.image_size

    @property
    def trained_on(self) -> str:
        """The hash of the index that it was trained on; empty where that is not recorded."""
        return self.source.trained_on


def open_networks(
    paths: Sequence[str | Path],
    image_size: int | None,
    *,
    averaged: Sequence[bool] = (False,),
    dtype: torch.dtype = torch.float32,
    every: int | None = None,
) -> list[Network]:
    """Find and verify every WEIGHTS, so that a fault in the last is found before the first is run. Reads no tensors.

    Collective, with the same result on every rank.

    Args:
        image_size: to run them at; None: each as trained.
        averaged: which weights of each path: as trained (False), their Polyak average (True), or both in turn.
        every: of each path, which is a run's, all checkpoints after a multiple of so many steps (`choose_every`).

    Raises:
        InputError: no such weights, the same ones twice, no average, an image size below a patch; with `every`, as
            `choose_every`.
    """
    found: dict[Path, Network] = {}
    networks = []
    for path, source in _sources(paths, every):
        sizes = {"image_size": image_size or source.spec.image_size, "dropout": 0.0, "drop_path": 0.0}
        spec = together(partial(replace, source.spec, **sizes))
        first = found.setdefault(source.path.resolve(), Network("", path, source, False, spec, dtype))
        if first.source is not source:
            raise InputError(f"--init: {first.path} and {path}: the same weights twice, {source.path}; give each once")
        for kind in averaged:
            together(partial(source.check_kind, kind))
            networks.append(replace(first, averaged=kind))
        if isinstance(source, FileSource) and source.is_average:
            if len(averaged) > 1:
                raise InputError(
                    f"--weights both: {path} holds averaged weights alone; --weights averaged would be right"
                )
            networks[-1] = replace(first, averaged=True)
    return name_networks(networks)


def _sources(paths: Sequence[str | Path], every: int | None) -> Iterator[tuple[str | Path, Source]]:
    for path in paths:
        for source in [choose(path)] if every is None else choose_every(path, every):
            yield path, source


def name_networks(networks: Sequence[Network]) -> list[Network]:
    """With what a report calls each: its run, by as many last parts of the path as it takes to tell all apart, then the
    step where a checkpoint was named or the run has several, and whether it is the average.
    """
    places = [_place(one.source) for one in networks]
    for depth in range(1, max(map(len, places)) + 1):
        named = [replace(one, run="/".join(place[-depth:])) for one, place in zip(networks, places, strict=True)]
        ids = _ids(named)
        if len({one.run for one in named}) == len(set(places)) and len(set(ids)) == len(ids):
            break
    else:  # a run may be called as a step of another is
        ids = [f"{id}: {one.source.path}" for id, one in zip(ids, named, strict=True)]
    return [replace(one, id=id) for one, id in zip(named, ids, strict=True)]


def _ids(networks: Sequence[Network]) -> list[str]:
    steps: dict[str, set[int | None]] = {}
    for one in networks:
        steps.setdefault(one.run, set()).add(one.source.step)
    ids = []
    for one in networks:
        itself = isinstance(one.source, SavedSource) and Path(one.path).resolve() == one.source.path.resolve()
        step = f" step {one.source.step}" if itself or len(steps[one.run]) > 1 else ""
        ids.append(one.run + step + (" averaged" if one.averaged else ""))
    return ids


def _place(source: Source) -> tuple[str, ...]:
    """The parts of the path of a checkpoint's run folder; of one that lies elsewhere, of the folder that holds it; of a
    file itself. Of a URL, scheme and host are the first part.
    """
    scheme, separator, rest = source.name.partition("://")
    if separator and isinstance(source, FileSource):
        host, *parts = rest.split("/")
        return (f"{scheme}://{host}", *parts)
    path = source.path.resolve()
    if isinstance(source, SavedSource):
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return path.parts[1:]
