"""The newest checkpoint that is whole, chosen by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pretrain.checkpoint import checkpoint
from pretrain.checkpoint.checkpoint import Saved
from pretrain.checkpoint.reading import patiently
from pretrain.errors import FileSystemError, InputError, StorageError
from pretrain.progress import Progress
from pretrain.ranks.collectives import is_main, on_main, portion, together


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
    together(lambda: verify_with_progress(saved, portion(sorted(saved.state["files"]))))
    return saved


def verify_with_progress(saved: Saved, names: Sequence[str]) -> None:
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
