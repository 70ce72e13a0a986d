"""Errors that are not defects of the program, and the hint they give for a misspelt name."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """A config, shard, index or checkpoint is at fault.

    The message names what and where (file, key or shard), what was found, and what would be right. The commands
    print it without a traceback and exit with status 2.
    """

    only_this_rank = False  # whether no other rank knows of it, so that this one must report it


class FileSystemError(InputError):
    """The file system refuses: permission, room, a name. It does not mean that what is stored is at fault."""


class StorageError(InputError):
    """Storage failed in a way that passes: the same command may succeed later.

    A run that has a checkpoint then ends with status 75, not 2.
    """


class DivergedError(RuntimeError):
    """Losses or gradients have become useless: nothing trained from here on is worth keeping."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is a misspelling of; None where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)), None)
