"""Checkpoints: written aside, flushed, renamed; `latest` last. A damaged one is never taken for whole.

checkpoints/
  latest                            the name of the newest, a text file
  step_00001000/
    state.json                      step, stream position, config, network; sizes and hashes of the files beside it
    layout.json                     which piece of which parameter each rank's files hold
    weights.00000.safetensors       of rank 0: its pieces of the fp32 weights
    average.00000.safetensors       … of their Polyak average, where one is kept
    optimizer.00000.safetensors     … of the optimizer's states

The pieces bear the names of the network's parameters and know nothing of ZeRO: any number of ranks reads them, under
any stage.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import files
from pretrain.checkpoint import archive
from pretrain.checkpoint.fingerprint import AVERAGE, WEIGHT, fingerprint
from pretrain.checkpoint.reading import ABSENT, patiently
from pretrain.errors import InputError, StorageError
from pretrain.files import flush

FORMAT = 2
LATEST, STATE, LAYOUT = "latest", "state.json", "layout.json"
_PREFIX, _PARTIAL, _DAMAGED = "step_", "partial_", "damaged_"
_FILES = {WEIGHT: "weights", AVERAGE: "average"}  # the file a kind of values is in; all others are the optimizer's

Piece = tuple[str, int, int]  # parameter, first value, number of values


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file["bytes"] for file in self.state["files"].values())

    @property
    def sha256(self) -> str:
        """Of all it holds, as the hashes of its files are part of its state."""
        return seal(self.state)


@dataclass(frozen=True)
class Record:
    """What one rank has written of a checkpoint."""

    rank: int
    pieces: list[Piece]
    files: dict[str, dict[str, Any]]  # name → bytes, sha256
    fingerprints: dict[str, int]  # of its share of each kind


def partial(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is written before it is whole."""
    return folder / f"{_PARTIAL}{step:08d}"


def whole(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps stands when it is."""
    return folder / f"{_PREFIX}{step:08d}"


def file_name(kind: str, rank: int) -> str:
    """The file that holds a rank's pieces of `kind`."""
    return f"{_FILES.get(kind, 'optimizer')}.{rank:05d}.safetensors"


def tensor_name(kind: str, name: str, begin: int) -> str:
    """The name, in its file, of the piece of the parameter `name` that starts at `begin`."""
    return f"{kind}:{name}:{begin}"


def write_share(
    path: Path, rank: int, pieces: Sequence[Piece], values: dict[str, Sequence[Tensor]], places: dict[str, int]
) -> Record:
    """Write one rank's share of a checkpoint into the folder `path`. Not collective: ranks write side by side.

    Args:
        values: by kind, the fp32 values of each of `pieces`, on the host.
        places: where each parameter begins in the row of all.
    """
    path.mkdir(parents=True, exist_ok=True)
    contents: dict[str, list[tuple[str, Tensor]]] = {}
    for kind, tensors in values.items():
        named = [(tensor_name(kind, name, begin), v) for (name, begin, _), v in zip(pieces, tensors, strict=True)]
        contents.setdefault(file_name(kind, rank), []).extend(named)
    files = {name: archive.write(path / name, tensors) for name, tensors in contents.items()}
    flush(path)
    prints = {
        kind: sum(fingerprint(v, places[name] + begin) for (name, begin, _), v in zip(pieces, tensors, strict=True))
        for kind, tensors in values.items()
    }
    return Record(rank, list(pieces), files, prints)


def commit(folder: Path, step: int, records: Sequence[Record], state: dict[str, Any]) -> Path:
    """Make whole what the ranks have written aside: for one rank, when all have.

    Args:
        records: every rank's.
        state: what `state.json` holds beside the step and the files.
    """
    aside, final = partial(folder, step), whole(folder, step)
    layout = json.dumps({record.rank: record.pieces for record in records}, separators=(",", ":"))
    write_text(aside / LAYOUT, layout)
    files = {LAYOUT: {"bytes": len(layout.encode()), "sha256": archive.sha256(aside / LAYOUT)}}
    for record in records:
        files |= record.files
    prints = {
        kind: f"{sum(record.fingerprints[kind] for record in records) % 2**64:016x}" for kind in records[0].fingerprints
    }
    known = {"format": FORMAT, "step": step, "ranks": len(records), **state, "fingerprints": prints, "files": files}
    write_text(aside / STATE, json.dumps({**known, "seal": seal(known)}, indent=1))
    if os.path.lexists(final):
        set_aside([final])
    os.replace(aside, final)
    flush(folder)
    with suppress(OSError):  # it is whole, and found without: the next one, or the next start, has `latest` name it
        point(folder)
    return final


def seal(state: dict[str, Any]) -> str:
    """The hash by which `state.json`, which holds those of all other files, shows damage of its own."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def candidates(folder: Path) -> list[Path]:
    """What looks like a checkpoint under `folder`, newest first; not what somebody named otherwise beside them.

    Raises:
        OSError: the folder cannot be listed, which is not to be taken for there being none.
    """
    try:
        names = os.listdir(folder)
    except ABSENT:
        return []
    return sorted(filter(is_named, (folder / name for name in names)), key=_step, reverse=True)


def is_named(path: Path) -> bool:
    """Whether a folder bears the name of a checkpoint."""
    return path.name.startswith(_PREFIX) and path.name.removeprefix(_PREFIX).isdecimal()


def newest(folder: Path) -> tuple[Saved | None, dict[Path, str]]:
    """The newest checkpoint under `folder` whose files have their sizes, and what is wrong with each newer one.

    Raises:
        StorageError: one cannot be read for now; it may be whole.
        OSError: one may not be read, which does not pass.
    """
    passed_over: dict[Path, str] = {}
    for path in patiently(folder, bound(candidates, folder)):
        try:
            return read(path), passed_over
        except StorageError:
            raise
        except InputError as error:
            passed_over[path] = str(error)
    return None, passed_over


def read(path: Path) -> Saved:
    """The checkpoint in the folder `path`.

    Raises:
        InputError: it is not whole: no `state.json`, or a file is missing or of another size than was written.
        StorageError: storage does not serve it for now.
        OSError: it may not be read.
    """
    try:
        state = json.loads(patiently(path / STATE, bound((path / STATE).read_text, encoding="utf-8")))
    except ABSENT:
        raise InputError(f"checkpoint {path}: no {STATE}, so it is no whole checkpoint") from None
    except ValueError as error:
        raise InputError(f"checkpoint {path}: {STATE} cannot be read: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else state
        raise InputError(f"checkpoint {path}: format {found!r}, this version reads {FORMAT}")
    if state.pop("seal", None) != seal(state):
        raise InputError(f"checkpoint {path}: damaged: {STATE} is not what was written")
    for name, written in state["files"].items():
        found = patiently(path / name, bound(_size, path / name))
        if found != written["bytes"]:
            what = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"checkpoint {path}: damaged: {name} {what}, {written['bytes']} bytes were written")
    return Saved(path, state["step"], state)


def verify(
    saved: Saved, names: Iterable[str] | None = None, advance: Callable[[int], None] = lambda count: None
) -> None:
    """Compare the files (all, or those of `names`) with the hashes taken when they were written.

    `advance` is told how many more bytes have been read.

    Raises:
        InputError: naming the first file that differs.
        StorageError: storage does not serve it for now.
        OSError: it may not be read.
    """
    for name in saved.state["files"] if names is None else names:
        written = saved.state["files"][name]["sha256"]
        try:
            found = patiently(saved.path / name, bound(archive.sha256, saved.path / name, advance))
        except ABSENT:
            raise InputError(f"checkpoint {saved.path}: damaged: {name} is missing") from None
        if found != written:
            raise InputError(
                f"checkpoint {saved.path}: damaged: {name} has sha256 {found[:12]}…, {written[:12]}… was written"
            )


def set_aside(paths: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they neither count among those kept nor stand where a new one goes.

    None takes the place of one that is there: of two of the same step either may have what somebody needs.
    """
    for path in paths:
        name = f"{_DAMAGED}{path.name.removeprefix(_PREFIX)}"
        names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
        os.replace(path, next(aside for aside in map(path.with_name, names) if not os.path.lexists(aside)))


def clear_partial(folder: Path) -> None:
    """Remove what interrupted saves and removals left behind. For one rank, while none saves."""
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of more than `step` steps, newest first, and mend `latest`. For one rank."""
    for path in candidates(folder):
        if _step(path) > step:
            _remove(path)
    point(folder)


def prune(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and the first one of every `keep_every` steps. For one rank.

    The first, not the one of that very step: a run that saves by the clock seldom has it.
    """
    found = [(_step(path), path) for path in candidates(folder)]
    firsts = {step // keep_every: step for step, _ in found} if keep_every else {}  # newest first: the last one stays
    firsts.pop(0, None)
    for step, path in found[keep:]:
        if step not in firsts.values():
            _remove(path)


def point(folder: Path) -> None:
    """Have `latest` name the newest checkpoint that stands under `folder`, if one does. For one rank."""
    for path in candidates(folder)[:1]:
        write_text(folder / LATEST, path.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    with files.whole(path) as file:
        file.write(text.encode())


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _size(path: Path) -> int | None:
    """A file's size; None where there is no such file."""
    try:
        status = path.stat()
    except ABSENT:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _remove(path: Path) -> None:
    # Renamed first: a half-removed checkpoint must not look like one.
    doomed = path.with_name(f"{_PARTIAL}{path.name.removeprefix(_PREFIX)}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
