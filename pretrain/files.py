"""Files: refusals of the file system with path, reason and remedy; atomic writes, hashes, patient reading."""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from pretrain.errors import FileSystemError, InputError, StorageError

Result = TypeVar("Result")

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # these say that no such file is there
_ATTEMPTS, _PAUSE = 4, 2.0  # seconds after the first attempt, twice as long after each one that follows
_BLOCK = 1 << 20  # bytes hashed at a time

# Errors of a network file system that pass: a server that fails over, a stale handle, a client that was evicted
# (Lustre: ESHUTDOWN), a route that is gone. Not every platform has every name.
PASSING = {
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ENOTCONN", "ESHUTDOWN"),
        *("ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH"),
    )
    if hasattr(errno, name)
}
_ROOM = "make room there, or name a place on another disk"
_DENIED = (errno.EACCES, errno.EPERM)
# Lasting errors, and the remedy.
_REMEDIES = {
    **dict.fromkeys(_DENIED, "have it opened, or name another place"),
    errno.ENAMETOOLONG: "a shorter name would be right",
    errno.ELOOP: "its links lead to one another; name what they stand for",
    errno.ENOTDIR: "a part of it is a file; name a folder",
    errno.EISDIR: "a file would be right",
    errno.EEXIST: "something else has this name; name another place",
    errno.ENOTEMPTY: "something else has this name; name another place",
    errno.EROFS: "name a place that can be written to",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "lift the limit of a file's size (ulimit -f), or name a file system that takes larger ones",
    errno.EMFILE: "lift the limit of open files (ulimit -n)",
    errno.ENFILE: "this machine has too many open files: end what holds them",
}


def exists(path: str | Path) -> bool:
    """Whether something exists at `path`.

    Raises:
        FileSystemError: the file system does not tell, as in a folder that may not be searched.
        StorageError: it does not tell for now.
    """
    return _mode(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether a file exists at `path`. Raises as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: str | Path) -> bool:
    """Whether a folder exists at `path`. Raises as `exists`."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def refuses(error: OSError) -> bool:
    """Whether an error is lasting, and not only that there is no such file."""
    return error.errno in _REMEDIES


def refusal(error: OSError) -> InputError | None:
    """An error of the file system with path, reason and remedy: FileSystemError, or StorageError if it may pass.

    None if it names no path, or has no remedy here.
    """
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return None
    path = Path(os.fsdecode(error.filename))
    if error.errno in PASSING:
        return StorageError(f"{path}: cannot be reached for now: {error.strerror}")
    if not refuses(error):
        return None
    whose = _whose(path) if error.errno in _DENIED else ""
    return FileSystemError(f"{path}: {error.strerror}{whose}; {_REMEDIES[error.errno or 0]}")


def failure(path: str | Path, error: OSError) -> InputError:
    """As `refusal`, for an error at `path`; InputError where there is no remedy."""
    error.filename = str(path)
    return refusal(error) or InputError(f"{path}: {error.strerror or error}")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write: beside `path`, flushed and renamed to it when the block ends well, else removed.

    A reader sees the old content or the new, never a part. Raises OSError, which names `path`; its folder where that
    may not be written to.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            with open(aside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            flush(path.parent)
    except PermissionError as error:
        error.filename = str(path.parent)
        raise
    finally:
        with suppress(OSError):  # renamed
            aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def sha256(file: Path | BinaryIO, advance: Callable[[int], None] = lambda count: None) -> str:
    """The hex digest of a whole file. `advance` is told how many more bytes have been read."""
    if isinstance(file, Path):
        with file.open("rb", buffering=0) as opened:
            return sha256(opened, advance)
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(_BLOCK):
        digest.update(block)
        advance(len(block))
    return digest.hexdigest()


def patiently(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns of `path`, tried again a few times where storage fails (EIO, ESTALE, ETIMEDOUT, …).

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: there is no such file.
        OSError: it may not be read, which does not pass; it names `path`.
        StorageError: it fails every time.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            return read()
        except ABSENT:
            raise
        except OSError as error:
            if refuses(error):
                error.filename = error.filename or str(path)
                raise
            why = error.strerror or str(error)
    raise StorageError(f"{path}: cannot be read for now: {why}, {_ATTEMPTS} times")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an OSError inside name `path`: it may name a temporary file or, on a full disk, nothing."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def make_folder(path: Path) -> None:
    """Make a folder, if it does not exist.

    Raises:
        OSError: it cannot be made or written to; names it.
        FileSystemError: its file system has no folders to make, or it is a dangling link.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # its parents exist by now: a file system like /proc
        raise FileSystemError(f"{path}: no folder can be made here; name another place") from None
    except FileExistsError:
        if path.is_symlink() and not exists(path):
            raise FileSystemError(f"{path}: a link to {os.readlink(path)}, which is not there; make that") from None
        raise
    with naming(path):
        tempfile.TemporaryFile(dir=path).close()


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise failure(path, error) from error
    except ValueError:  # a NUL, or half of a surrogate pair
        raise InputError(f"{str(path)!r}: not a path") from None


def _whose(path: Path) -> str:
    """What denies access to `path`, and its owner: a folder that may not be searched, else `path`, else its folder."""
    searchable = {"effective_ids": True} if os.access in os.supports_effective_ids else {}
    closed = [folder for folder in path.parents if not os.access(folder, os.X_OK, **searchable)]
    barred = closed[-1] if closed else path if os.path.lexists(path) else path.parent
    try:
        found = os.stat(barred)
    except OSError:
        return ""
    return f" ({barred} is {stat.filemode(found.st_mode)} of {_user(found.st_uid)}, you are {_user(os.geteuid())})"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
