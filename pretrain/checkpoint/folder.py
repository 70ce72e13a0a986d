"""The checkpoints of a run: written aside, renamed when whole, `latest` last; found, verified, kept and removed.

checkpoints/
  latest, best                      the name of the newest, and of the best where one is kept: text files
  step_00001000/                    a whole checkpoint (`checkpoint.step`)
  partial_00002000/                 one that is being written
  damaged_00000500/                 one that was found damaged, moved out of the way
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.checkpoint.pieces import Share
from pretrain.checkpoint.step import FORMAT, LAYOUT, STATE, Checkpoint, seal
from pretrain.errors import FileSystemError, InputError, StorageError
from pretrain.files import ABSENT, patiently
from pretrain.ranks.collectives import on_main, rank_slice, together

LATEST, BEST = "latest", "best"  # files that name a checkpoint
_PREFIX, _PARTIAL, _DAMAGED = "step_", "partial_", "damaged_"


def partial_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is written until it is whole."""
    return folder / f"{_PARTIAL}{step:08d}"


def step_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return folder / f"{_PREFIX}{step:08d}"


def commit(folder: Path, step: int, shares: Sequence[Share], state: dict[str, Any]) -> Path:
    """Make a checkpoint whole once every rank has written its share aside. For one rank.

    Args:
        folder: of the checkpoints.
        step: steps completed.
        shares: every rank's.
        state: what `state.json` holds beside the step and the files.
    """
    aside, final = partial_path(folder, step), step_path(folder, step)
    layout = json.dumps({share.rank: share.pieces for share in shares}, separators=(",", ":"))
    files.write_text(aside / LAYOUT, layout)
    written = {LAYOUT: {"bytes": len(layout.encode()), "sha256": files.sha256(aside / LAYOUT)}}
    for share in shares:
        written |= share.files
    prints = {
        kind: f"{sum(share.fingerprints[kind] for share in shares) % 2**64:016x}" for kind in shares[0].fingerprints
    }
    known = {"format": FORMAT, "step": step, "ranks": len(shares), **state, "fingerprints": prints, "files": written}
    files.write_text(aside / STATE, json.dumps({**known, "seal": seal(known)}, indent=1))
    if os.path.lexists(final):
        set_aside([final])
    os.replace(aside, final)
    files.flush(folder)
    with suppress(OSError):  # the checkpoint is whole and found without; the next save or start updates `latest`
        update_latest(folder)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders under `folder` that bear the name of a checkpoint, newest first.

    Raises:
        OSError: the folder cannot be listed, which does not mean that there are none.
    """
    try:
        names = os.listdir(folder)
    except ABSENT:
        return []
    return sorted(filter(is_checkpoint_name, (folder / name for name in names)), key=step_of, reverse=True)


def is_checkpoint_name(path: Path) -> bool:
    """Whether a folder bears the name of a checkpoint."""
    return path.name.startswith(_PREFIX) and path.name.removeprefix(_PREFIX).isdecimal()


def is_pointer(path: Path) -> bool:
    """Whether `path` is a file `latest` or `best`."""
    return path.name in (LATEST, BEST) and files.is_file(path)


def named_by(pointer: Path) -> Path:
    """The checkpoint that a file `latest` or `best` names.

    Raises:
        InputError: it names none.
        StorageError, FileSystemError: it cannot be read for now, or may not be.
    """
    text = patiently(pointer, partial(pointer.read_text, encoding="utf-8", errors="replace"))
    path = pointer.parent / text.strip()
    if path.parent != pointer.parent or not is_checkpoint_name(path):
        raise InputError(f"{pointer}: names {path.name!r}; the name of a checkpoint beside it would be right")
    if not files.is_folder(path):
        raise InputError(f"{pointer}: names {path.name}, which is not there any more")
    return path


def newest(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint whose files have their sizes, and what is wrong with each newer one. Not collective.

    Raises:
        StorageError: one cannot be read for now; it may be whole.
        OSError: one may not be read, which does not pass.
    """
    return _first_whole(patiently(folder, partial(list_checkpoints, folder)), Checkpoint.read)


def list_on_main(folder: Path) -> list[Path]:
    """The checkpoints that rank 0 sees under `folder`, newest first, on every rank. Collective.

    Raises:
        StorageError, FileSystemError: the folder cannot be listed for now, or may not be.
    """
    return on_main(lambda: patiently(folder, partial(list_checkpoints, folder)))


def read_verified(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, sizes and hashes checked; the same on every rank. Collective.

    Rank 0 checks the sizes; the ranks share the reading of the files.

    Raises:
        InputError: it is not whole.
        StorageError: it cannot be read for now.
    """
    found = on_main(lambda: Checkpoint.read(path))
    together(lambda: found.verify_with_progress(rank_slice(sorted(found.state["files"]))))
    return found


def newest_verified(folder: Path, upto: Path | None = None) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint whose files have their hashes, and what is wrong with each newer one. Collective.

    Rank 0 lists the folder: a network file system may show the ranks different content, and all must resume alike.

    Args:
        folder: of the checkpoints.
        upto: the newest one to consider; None: any.

    Raises:
        StorageError, FileSystemError: one cannot be read for now, or may not be. It is not passed over: it may be
            whole, and hours newer than the next.
    """
    found = list_on_main(folder)
    return _first_whole(found[found.index(upto) if upto in found else 0 :], read_verified)


def set_aside(paths: Iterable[Path]) -> None:
    """Rename damaged checkpoints `damaged_…`: they neither count among those kept nor block a new one. For one rank.

    An earlier one of the same step is not replaced: either may have what somebody needs.
    """
    for path in paths:
        name = f"{_DAMAGED}{path.name.removeprefix(_PREFIX)}"
        names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
        os.replace(path, next(aside for aside in map(path.with_name, names) if not os.path.lexists(aside)))


def remove_partial(folder: Path) -> None:
    """Remove what interrupted saves and removals left behind. For one rank, while none saves."""
    for leftover in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of more than `step` steps, newest first, and update `latest`. For one rank."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            _remove(path)
    update_latest(folder)


def prune(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, the first of every `keep_every` steps, and the best. For one rank.

    The first within these steps, not the one at a multiple of them: a run that saves by the clock seldom has that one.
    """
    found = [(step_of(path), path) for path in list_checkpoints(folder)]
    firsts = {step // keep_every: step for step, _ in found} if keep_every else {}  # newest first: the last one stays
    firsts.pop(0, None)
    best = (folder / BEST).read_text(encoding="utf-8").strip() if files.exists(folder / BEST) else None
    for step, path in found[keep:]:
        if step not in firsts.values() and path.name != best:
            _remove(path)


def update_latest(folder: Path) -> None:
    """Write the name of the newest checkpoint under `folder` into `latest`, if there is one. For one rank."""
    for path in list_checkpoints(folder)[:1]:
        point_to(folder, LATEST, step_of(path))


def point_to(folder: Path, name: str, step: int) -> None:
    """Have the file `name`, `latest` or `best`, name the checkpoint of `step` steps. For one rank."""
    files.write_text(folder / name, step_path(folder, step).name)


def _first_whole(
    paths: Iterable[Path], read: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint | None, dict[Path, str]]:
    passed_over: dict[Path, str] = {}
    for path in paths:
        try:
            return read(path), passed_over
        except StorageError as error:
            raise StorageError(
                f"{error}; should that last, move {path} away to resume from the one before it"
            ) from None
        except FileSystemError:
            raise
        except InputError as error:
            passed_over[path] = str(error)
    return None, passed_over


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.removeprefix(_PREFIX))


def _remove(path: Path) -> None:
    # Renamed first: a half-removed checkpoint must not look like one.
    doomed = path.with_name(f"{_PARTIAL}{path.name.removeprefix(_PREFIX)}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
