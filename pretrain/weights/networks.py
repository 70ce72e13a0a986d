"""The networks that are scored: the WEIGHTS of a command, and what a report calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.ranks.collectives import together
from pretrain.weights.load import FileSource, SavedSource, Source, choose


@dataclass(frozen=True)
class Network:
    """A network to be scored: one WEIGHTS, raw or averaged, which is not read yet.

    Args:
        id: what a report calls it.
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
) -> list[Network]:
    """Find and verify every WEIGHTS, so that a fault in the last is found before the first is run. Reads no tensors.

    Collective, with the same result on every rank.

    Args:
        image_size: to run them at; None: each as trained.
        averaged: which weights of each path: as trained (False), their Polyak average (True), or both in turn.

    Raises:
        InputError: no such weights, the same ones twice, no average, an image size below a patch.
    """
    found: dict[Path, Network] = {}
    networks = []
    for path in paths:
        source = choose(path)
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
    return [replace(network, id=id) for network, id in zip(networks, _ids(networks), strict=True)]


def _ids(networks: Sequence[Network]) -> list[str]:
    """What each is called in a report: its run, by as many last parts of the path as tell the runs apart, then the step
    where a checkpoint was named or the run has several, and whether it is the average.
    """
    runs = [_run_folder(one.source) for one in networks]
    depth = 1
    while depth < max(len(run.parts) for run in runs) and len({run.parts[-depth:] for run in runs}) < len(set(runs)):
        depth += 1
    ids = []
    for network, run in zip(networks, runs, strict=True):
        steps = {other.source.step for other, theirs in zip(networks, runs, strict=True) if theirs == run}
        saved = isinstance(network.source, SavedSource)
        named = saved and (len(steps) > 1 or Path(network.path).resolve() == network.source.path.resolve())
        name = Path(*run.parts[-depth:]).as_posix().lstrip("/")
        ids.append(name + (f" step {network.source.step}" if named else "") + (" averaged" if network.averaged else ""))
    return ids


def _run_folder(source: Source) -> Path:
    """The run folder of a checkpoint; of one that lies elsewhere, the folder that holds it; a file itself."""
    if not isinstance(source, SavedSource):
        return Path(source.name.partition("://")[2] or source.path.resolve())
    path = source.path.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent
