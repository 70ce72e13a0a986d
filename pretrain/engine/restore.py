"""A checkpoint's values, put wherever they are wanted: into an engine on any ranks and ZeRO stage, or whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.engine import checkpoint
from pretrain.engine.archive import Archive
from pretrain.engine.checkpoint import Saved, file_name, tensor_name
from pretrain.engine.distributed import collect, is_main, on_main, portion, together
from pretrain.engine.fragments import AVERAGE, WEIGHT, check_names, fingerprint, held, kinds, places, refresh
from pretrain.engine.reading import patiently
from pretrain.engine.step import set_loss_scale
from pretrain.errors import FileSystemError, InputError, StorageError
from pretrain.stream.progress import Progress


class Pieces:
    """The values in a checkpoint, by kind, parameter and place, whatever ranks wrote them."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self._files: dict[str, Archive] = {}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # parameter → (begin, numel, rank)
        path = saved.path / checkpoint.LAYOUT
        layout = json.loads(patiently(path, partial(path.read_text, encoding="utf-8")))
        for rank, pieces in layout.items():
            for name, begin, numel in pieces:
                self._pieces.setdefault(name, []).append((begin, numel, int(rank)))
        for found in self._pieces.values():
            found.sort()

    def read(self, kind: str, name: str, into: Tensor, begin: int) -> None:
        """Fill `into` [n] with the values of parameter `name` from `begin` on.

        Raises:
            InputError: the checkpoint does not hold all of them.
        """
        at, end = begin, begin + len(into)
        for first, numel, rank in self._pieces.get(name, ()):
            if first <= at < first + numel and at < end:
                upto = min(first + numel, end)
                values = self._archive(kind, rank).read(tensor_name(kind, name, first), at - first, upto - at)
                into[at - begin : upto - begin].copy_(values)
                at = upto
        if at < end:
            raise InputError(f"checkpoint {self._saved.path}: holds no {kind} of {name} from value {at} on")

    def _archive(self, kind: str, rank: int) -> Archive:
        name = file_name(kind, rank)
        if name not in self._files:
            self._files[name] = Archive(self._saved.path / name)
        return self._files[name]


def look(folder: Path) -> list[Path]:
    """What rank 0 sees of checkpoints under `folder`, newest first. Collective.

    Raises:
        StorageError, FileSystemError: the folder cannot be listed for now, or may not be.
    """
    return on_main(lambda: patiently(folder, partial(checkpoint.candidates, folder)))


def read_verified(path: Path) -> Saved:
    """The checkpoint in the folder `path`, whose files are what was written; the same on every rank. Collective.

    Rank 0 asks for the sizes of so many files, the ranks divide the reading among themselves.

    Raises:
        InputError: it is not whole. StorageError: it cannot be read for now.
    """
    saved = on_main(lambda: checkpoint.read(path))
    together(lambda: _verify(saved, portion(sorted(saved.state["files"]))))
    return saved


def _verify(saved: Saved, names: Sequence[str]) -> None:
    """`checkpoint.verify`, on rank 0 with its progress: it reads gigabytes."""
    size = sum(saved.state["files"][name]["bytes"] for name in names)
    with Progress(f"checking {saved.path.name}", "bytes", size) as progress:
        checkpoint.verify(saved, names, progress.advance if is_main() else lambda count: None)


def newest_whole(folder: Path, upto: Path | None = None) -> tuple[Saved | None, dict[Path, str]]:
    """The newest checkpoint whose files are what was written, and what is wrong with each newer one. Collective.

    upto: the newest one that will do; None: any.

    Rank 0 looks: a network file system may show the ranks different folders, and they must resume as one.

    Raises:
        StorageError, FileSystemError: one cannot be read for now, or may not be. It is not passed over: it may be
            whole, and hours newer than the next.
    """
    passed_over: dict[Path, str] = {}
    found = look(folder)
    for path in found[found.index(upto) if upto in found else 0 :]:
        try:
            return read_verified(path), passed_over
        except StorageError as error:
            raise StorageError(f"{error}; should that last, move {path} away to go on from the one before it") from None
        except FileSystemError:
            raise
        except InputError as error:
            passed_over[path] = str(error)
    return None, passed_over


@torch.no_grad()
def restore(engine: Any, saved: Saved, loaded: Callable[[int], None] = lambda values: None) -> None:
    """Put a checkpoint's weights, optimizer states and counts into `engine`. Collective.

    `loaded` is told how many more values this rank has, of its `values_held`. Every value is then read back out of the
    engine: what it holds must have the fingerprints that were saved, and the network must compute with it.

    Raises:
        InputError: the checkpoint does not hold what this optimizer needs, or the engine does not hold what was loaded.
    """
    optimizer, state = engine.basic_optimizer, saved.state
    missing = [kind for kind in kinds(engine) if kind not in (*state["fingerprints"], AVERAGE)]
    if missing:
        raise InputError(f"checkpoint {saved.path}: holds no {', '.join(missing)}; it is of another optimizer")

    def fill() -> None:
        pieces = Pieces(saved)
        for fragment in held(engine):
            for kind in kinds(engine):
                # An average that begins now begins as the weights.
                source = kind if kind in state["fingerprints"] else WEIGHT
                view = fragment.view(optimizer, kind)
                if view.device.type == "cpu":
                    pieces.read(source, fragment.name, view, fragment.begin)
                else:
                    host = torch.empty(fragment.numel)
                    pieces.read(source, fragment.name, host, fragment.begin)
                    view.copy_(host)
                loaded(fragment.numel)

    together(fill)
    optimizer.set_updates(state["updates"])
    set_loss_scale(engine, state["loss_scale"])
    engine.global_steps = saved.step
    refresh(engine)
    check_names(engine)  # a network to be resumed was built unset: then there was little to compare
    for kind, written in state["fingerprints"].items():
        if kind in kinds(engine) and (found := fingerprint_of(engine, kind)) != written:
            raise InputError(
                f"checkpoint {saved.path}: after loading, the fingerprint of {kind} is {found}, {written} was saved; "
                "the engine does not hold what the checkpoint does"
            )


def fingerprint_of(engine: Any, kind: str) -> str:
    """The fingerprint of all values of `kind`, as the ranks hold them; of unlike copies, an unlike one. Collective."""
    optimizer, place = engine.basic_optimizer, places(engine)
    mine = sum(fingerprint(part.view(optimizer, kind), place[part.name] + part.begin) for part in held(engine))
    prints = [value % 2**64 for value in collect([mine])]
    if engine.zero_optimization_stage() == 0:  # every rank has all values
        odd = [value for value in prints if value != prints[0]]
        return f"{(odd or prints)[0]:016x}"
    return f"{sum(prints) % 2**64:016x}"


def read_whole(saved: Saved, shapes: Mapping[str, tuple[int, ...]], *, averaged: bool = False) -> dict[str, Tensor]:
    """A checkpoint's weights, or their Polyak average, as whole fp32 tensors on the CPU; hashes are checked first.

    Raises:
        InputError: it keeps no average, is damaged, or is of a network of other parameters.
    """
    kind = AVERAGE if averaged else WEIGHT
    if kind not in saved.state["fingerprints"]:
        raise InputError(
            f"checkpoint {saved.path}: keeps no averaged weights (optimizer.averaging was not set); take the raw ones"
        )
    _verify(saved, [checkpoint.LAYOUT, *(file_name(kind, rank) for rank in range(saved.state["ranks"]))])
    return dict(_whole(Pieces(saved), kind, shapes))


def _whole(pieces: Pieces, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        values = torch.empty(math.prod(shape))
        pieces.read(kind, name, values, 0)
        yield name, values.view(shape)
