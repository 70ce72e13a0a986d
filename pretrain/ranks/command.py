"""What the commands share: their options, and the exit statuses of the public interface."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from pretrain import files, keys
from pretrain.console import open_streams, say
from pretrain.errors import DivergedError, InputError, StorageError
from pretrain.ranks.launcher import local_rank, rank
from pretrain.section import Section

DONE, DIVERGED, INPUT_AT_FAULT, STOPPED = 0, 1, 2, 75
_DEFECT, _INTERRUPTED = 1, 130
_OTHERS_FIRST = 5.0  # seconds


class CommandLineError(InputError):
    """The command line is at fault; every rank has the same one."""


class Parser(argparse.ArgumentParser):
    """A parser that raises an `InputError`: rank 0 reports it, with status 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *words], words, strict=False):
            name = before if not word else word[:-1]
            if not word or (word.startswith("--") and word.endswith("=")):
                self.error(
                    f"nothing is given after {name or 'the command'}; a shell's variable that is not set may be why"
                )
        return super().parse_known_args(args, namespace)

    def add_config(self, example: str, schema: Callable[[], type[Section]], *, required: bool = True) -> None:
        """Add the options of a command that reads a config: `--config`, `--keys`, overrides, and what launchers add.

        Args:
            example: the name of a shipped config.
            schema: called for `--keys` only, as few-shot's imports torch.
        """

        class ShowKeys(argparse.Action):
            def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
                if main_rank():
                    say(keys.text(schema()))
                parser.exit()

        self.add_argument(
            "--config", required=required, metavar="C", help=f"a JSON file, or its name under configs/ ({example})"
        )
        self.add_argument("--keys", action=ShowKeys, nargs=0, help="print the config's keys and exit")
        self.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # given by launchers
        self.add_argument("overrides", nargs="*", metavar="key.path=value", help="laid over the config, last wins")

    def error(self, message: str) -> NoReturn:
        raise CommandLineError(f"{message}; see {self.prog} --help")


def training_parser(command: str, description: str, example: str, schema: type[Section]) -> Parser:
    """The options that pre-training and fine-tuning share."""
    parser = Parser(prog=f"launch/{command}.py", description=f"{description} Resumes what --out holds.")
    parser.add_config(example, lambda: schema)
    parser.add_argument("--out", type=Path, help="run folder; default: runs/<name of the config>")
    parser.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="start from the weights of a run folder, a checkpoint inside one, or a file or URL of any known format",
    )
    parser.add_argument(
        "--weights", choices=("raw", "averaged"), help="of --init: as trained (the default), or their Polyak average"
    )
    parser.add_argument("--extend", action="store_true", help="resume with another train.steps/epochs or schedule")
    parser.add_argument(
        "--check", action="store_true", help="read config and data, say what the run would be, and write nothing"
    )
    return parser


def main_rank() -> bool:
    """Whether this process is rank 0; true where no launcher has set a rank."""
    return rank(os.environ) == 0


def run_command(command: Callable[[], int]) -> None:
    """Run `command` and exit with its status.

    - An `InputError`, or a refusal by the file system, becomes one message on stderr and status 2. A refusal that may
      pass (`StorageError`) does so only while the ranks have not met: later, one rank alone must not end with the
      status that says that the same command would not help.
    - A run that has diverged becomes one message and status 1.
    - Any other exception is a defect: a traceback and status 1.

    Rank 0 reports, except for what only other ranks know (`_speaks`).
    """
    open_streams()
    try:
        status = command()
    except InputError as error:
        status = _ended(error, INPUT_AT_FAULT, speaks=_speaks(error))
    except DivergedError as error:  # the ranks agree on it
        status = _ended(error, DIVERGED, speaks=main_rank())
    except SystemExit:
        raise
    except BaseException as error:
        refusal = files.refusal(error) if isinstance(error, OSError) else None
        if refusal is None or (isinstance(refusal, StorageError) and _have_met()):
            say(traceback.format_exc(), to=sys.stderr, end="")
            status = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _DEFECT
        else:
            refusal.only_this_rank = _have_met()
            status = _ended(refusal, INPUT_AT_FAULT, speaks=_speaks(refusal))
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # ValueError: it has been closed
            stream.flush()
    # Reader threads and process groups must not keep a rank alive that is finished or has failed.
    os._exit(status)


def _ended(error: Exception, status: int, *, speaks: bool) -> int:
    """Report the error if this rank `speaks`, and return `status`.

    A rank that does not speak waits for those that do: a launcher ends all ranks once the first has ended.
    """
    if speaks:
        who = "" if main_rank() else f"rank {rank(os.environ)} ({socket.gethostname()}): "
        say(f"error: {who}{error}", to=sys.stderr)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
        time.sleep(_OTHERS_FIRST)
    return status


def _speaks(error: InputError) -> bool:
    """Whether this rank reports `error`.

    Ranks that have met refuse together, and rank 0 reports. Before they meet, an error may concern one host only (its
    copy of the config, its compiler), so the first rank of each host reports. An error that only one rank can see (a
    damaged chunk of its shards) has `only_this_rank` set, and that rank reports.
    """
    if main_rank() or error.only_this_rank:
        return True
    if isinstance(error, CommandLineError) or _have_met():
        return False
    return local_rank(os.environ) == 0


def _have_met() -> bool:
    """Whether there is a process group; without torch imported there is none."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()
