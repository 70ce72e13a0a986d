"""Reading from storage that may not answer for a while, which says nothing of what is stored there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pretrain.errors import StorageError
from pretrain.files import refuses

Result = TypeVar("Result")

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # these say that no such file is there
_ATTEMPTS, _PAUSE = 4, 2.0  # seconds after the first, twice as long after each one that follows


def patiently(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns of `path`, tried again a few times where storage fails it (EIO, ESTALE, ETIMEDOUT, …).

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
