"""Image files below a folder, and data sets of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.console import say
from pretrain.datasets.dataset import Dataset, UnreadableFile, as_stored, fingerprint
from pretrain.errors import InputError
from pretrain.files import failure
from pretrain.storage.filekind import IMAGE_ENDINGS

_SHOWN = 3  # names in a message
_HEADS, _HEAD = 1000, 64 << 10  # files, bytes
# Left behind by archive tools, file systems and disk stations, which keep thumbnails in theirs.
_LEFTOVERS = {"__MACOSX", "@eaDir", "lost+found", "#recycle", "$RECYCLE.BIN", "System Volume Information"}


def file_dataset(
    name: str,
    split: str,
    base: Path,
    files: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    classes: Sequence[str] | None,
    starts: np.ndarray | None = None,
) -> Dataset:
    """A data set of image files below `base`, which are read one at a time when asked for."""
    targets = np.asarray(labels, np.int32)

    def read(row: int) -> tuple[str, bytes]:
        path = base / files[row]
        try:
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                raise UnreadableFile(f"{path}: no regular file ({stat.filemode(mode)})")  # opened, a FIFO would wait
            data = path.read_bytes()
        except PermissionError as error:
            raise UnreadableFile(f"{path}: cannot be read: {error.strerror}") from error
        except OSError as error:
            if path.is_symlink() and not path.exists():
                raise UnreadableFile(f"{path}: a link to {os.readlink(path)}, which is not there") from error
            raise failure(path, error) from error
        return as_stored(data, str(path))

    names = (os.fsencode(file) + b"\0" for file in [*files, *(classes or ())])
    offsets = [] if starts is None else [starts.astype(np.int64)]
    return Dataset(
        name=name,
        split=split,
        labels=targets,
        starts=starts,
        classes=None if classes is None else tuple(classes),
        fingerprint=fingerprint([*names, targets, *offsets]),
        read=read,
        files=_state(base, files),
    )


def _state(base: Path, files: Sequence[str]) -> str:
    """A hash of the sizes and times of all files, and of the first bytes of some, spread evenly: archives may give all
    files the same time, and bitmaps have the same size.
    """
    found = np.full((len(files), 2), -1, np.int64)
    heads = []
    every = -(-len(files) // _HEADS)
    for row, file in enumerate(files):
        path = os.path.join(base, file)
        with contextlib.suppress(OSError):  # `read` reports it
            known = os.stat(path)
            found[row] = known.st_size, known.st_mtime_ns
            if row % every == 0 and stat.S_ISREG(known.st_mode):
                with open(path, "rb") as head:
                    heads.append(head.read(_HEAD))
    return fingerprint([found, *heads])


def images(folder: Path, base: Path, others: list[str] | None = None) -> Iterator[str]:
    """Image files below `folder`, which is `base` or in it, sorted and relative to `folder`. Other files go to
    `others`, relative to `base`.

    Links to folders are followed. Raises InputError for one that leads back to a folder between `base` and itself.
    """
    above = itertools.accumulate(folder.relative_to(base).parts[:-1], Path.joinpath, initial=base)
    known = {} if folder == base else {_identity(path): path for path in above}

    def walk(current: Path, inside: str, known: dict[tuple[int, int], Path]) -> Iterator[str]:
        identity = _identity(current)
        if identity in known:  # os.walk would follow it until the system refuses the path, 40 links later
            link = next((path for path in (current, *current.parents) if path.is_symlink()), current)
            raise InputError(
                f"{link}: leads back to {known[identity]}, whose images would be taken again and again; remove this "
                "link (links to other folders are followed)"
            )
        below = []
        for entry in sorted(_entries(current), key=lambda entry: entry.name):
            if _is_folder(entry):
                below.append(entry.name)
            elif is_image_name(entry.name):
                yield os.path.join(inside, entry.name)
            elif others is not None:
                others.append(os.path.relpath(entry.path, base))
        for name in below:
            yield from walk(current / name, os.path.join(inside, name), {**known, identity: current})

    return walk(folder, "", known)


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def image_folders(folder: Path) -> list[str]:
    """Sub-folders that hold an image at any depth, sorted; only they can be splits or classes."""
    return [name for name in folders(folder) if _holds_image(folder / name)]


def folders(folder: Path) -> list[str]:
    """Sub-folders, sorted, without hidden ones and those that tools leave behind."""
    return sorted(entry.name for entry in _entries(folder) if _is_folder(entry))


def loose_images(folder: Path) -> list[str]:
    """Image files directly in a folder, sorted."""
    return sorted(entry.name for entry in _entries(folder) if is_image_name(entry.name) and not _is_folder(entry))


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS) and not _passed_over(name)


def _holds_image(folder: Path) -> bool:
    seen, left = set(), [folder]
    while left:
        current = left.pop()
        if (identity := _identity(current)) in seen:  # a link back, which `images` refuses
            continue
        seen.add(identity)
        for entry in _entries(current):
            if _is_folder(entry):
                left.append(Path(entry.path))
            elif is_image_name(entry.name):
                return True
    return False


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not _passed_over(entry.name))
    except OSError as error:
        raise failure(error.filename, error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name in _LEFTOVERS


def read_text(path: Path) -> str:
    """A text file's content, without a byte-order mark. Raises InputError for what cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise failure(path, error) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 from byte {error.start} on; save it as UTF-8") from error


def note(text: str) -> None:
    say(f"note: {text}", to=sys.stderr)


def shown(names: Any) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
