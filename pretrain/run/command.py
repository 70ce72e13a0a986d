"""How a command ends: the exit statuses of the public interface."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from pretrain.engine.guards import DivergedError
from pretrain.engine.place import rank
from pretrain.errors import InputError

DONE, DIVERGED, INPUT_AT_FAULT, STOPPED = 0, 1, 2, 75


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is an `InputError`: said once, by rank 0, with status 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main_rank() -> bool:
    """Whether this process is the one that speaks; true before any launcher has set a rank."""
    return rank(os.environ) == 0


def run_command(command: Callable[[], int]) -> None:
    """Run `command` and exit with its status; an `InputError` becomes one message on stderr and status 2.

    A run that has diverged ends with one message too, and status 1.

    What is checked before training is checked alike by every rank, so rank 0 alone reports it. An error that only
    one rank can see (a damaged chunk of its shards) carries `only_this_rank` and is reported where it happened.
    """
    try:
        status = command()
    except InputError as error:
        if main_rank() or getattr(error, "only_this_rank", False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = INPUT_AT_FAULT
    except DivergedError as error:  # the ranks agree on it
        if main_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = DIVERGED
    sys.stdout.flush()
    sys.stderr.flush()
    # Reader threads and process groups must not keep a finished rank alive.
    os._exit(status)
