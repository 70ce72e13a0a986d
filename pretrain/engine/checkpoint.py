"""Checkpoints: written aside, flushed, renamed; `latest` last. What is half-written is never taken for whole.

checkpoints/
  latest                     the name of the newest, a text file
  step_00001000/
    state.json               step, stream position, config, network; names and sizes of the files beside it
    mp_rank_00_model_states.pt, …   DeepSpeed's files: parameters, optimizer
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.engine.distributed import World, barrier
from pretrain.engine.quiet import quiet
from pretrain.errors import InputError

FORMAT = 1
LATEST = "latest"
STATE = "state.json"
_PREFIX, _PARTIAL, _DAMAGED = "step_", "partial_", "damaged_"


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], world: World) -> Path:
    """Write a checkpoint of `engine` after `step` steps. Collective.

    Args:
        folder: the run's `checkpoints/`, seen by every rank.
        state: what `state.json` holds beside the step and the list of files.
    """
    final, partial = folder / f"{_PREFIX}{step:08d}", folder / f"{_PARTIAL}{step:08d}"
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    barrier()
    with quiet():
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    if world.local_rank == 0:  # on each node, what its ranks have written
        for file in sorted(partial.iterdir()):
            _flush(file)
    barrier()
    if world.main:
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        record = {"format": FORMAT, "step": step, "ranks": world.size, "zero_stage": engine.zero_optimization_stage()}
        _write(partial / STATE, json.dumps({**record, **state, "files": files}, indent=1))
        os.replace(partial, final)
        _flush(folder)
        _write(folder / LATEST, final.name)
    barrier()
    return final


def load(engine: Any, saved: Saved) -> None:
    """Put a checkpoint's parameters and optimizer state into `engine`. Collective.

    Raises:
        InputError: DeepSpeed finds nothing to load in it.
    """
    with quiet():
        found, _ = engine.load_checkpoint(str(saved.path.parent), tag=saved.path.name, load_lr_scheduler_states=False)
    if found is None:
        raise InputError(f"checkpoint {saved.path}: DeepSpeed could not load it; remove it to use the one before")


def newest(folder: Path) -> tuple[Saved | None, dict[Path, str]]:
    """The newest whole checkpoint under `folder`, and the newer ones passed over, with what is wrong with each."""
    passed_over: dict[Path, str] = {}
    for path in sorted(folder.glob(f"{_PREFIX}*"), reverse=True):
        try:
            return read(path), passed_over
        except InputError as error:
            passed_over[path] = str(error)
    return None, passed_over


def set_aside(paths: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they neither count among those kept nor stand where a new one goes."""
    for path in paths:
        aside = path.with_name(f"{_DAMAGED}{path.name.removeprefix(_PREFIX)}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def read(path: Path) -> Saved:
    """The checkpoint in the folder `path`.

    Raises:
        InputError: it is not whole: no `state.json`, or a file is missing or of another size than was written.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"checkpoint {path}: no {STATE}, so it is no whole checkpoint") from None
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {path}: {STATE} cannot be read: {error}") from None
    if state.get("format") != FORMAT:
        raise InputError(f"checkpoint {path}: format {state.get('format')!r}, this version reads {FORMAT}")
    for name, size in state["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise InputError(f"checkpoint {path}: damaged: {name} {what}, {size} bytes were written")
    return Saved(path, state["step"], state)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted save left behind. For one rank."""
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in sorted(folder.glob(f"{_PREFIX}*"))[:-keep]:
        # Renamed first: a half-removed checkpoint must not look like one.
        doomed = path.with_name(f"{_PARTIAL}{path.name.removeprefix(_PREFIX)}")
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    _flush(aside)
    os.replace(aside, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
