"""The errors that are not the program's own, and the hint they give at a name that is misspelt."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """A config, shard, index or checkpoint is at fault.

    The message names what and where (file, key or shard), what was found, and what would be right. The commands
    print it without a traceback and exit with status 2.
    """

    only_this_rank = False  # whether no other rank knows of it, so that this one must tell it


class FileSystemError(InputError):
    """The file system refuses what it was asked for: permission, room, a name. It says nothing of what is stored."""


class StorageError(InputError):
    """Storage failed in a way that passes: the same command may succeed later.

    A run that has a checkpoint to go on from ends with status 75 then, not 2.
    """


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is a misspelling of; None where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)), None)


class DivergedError(RuntimeError):
    """The losses or gradients are no longer of use: nothing trained from here on is worth keeping."""
