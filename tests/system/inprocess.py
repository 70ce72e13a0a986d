"""Commands run in the test's own process: a start of Python and torch takes seconds each."""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


class _Ended(BaseException):
    """The command ends its process."""


def run_here(script, *arguments):
    """Run `launch/<script>` with these words, as `python launch/<script> …` would."""
    words = [str(ROOT / "launch" / script), *map(str, arguments)]
    status = 0
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "path", ["launch", *sys.path]),
        mock.patch.object(os, "_exit", side_effect=_Ended) as ended,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as errors,
        contextlib.suppress(_Ended, SystemExit),  # SystemExit: --help
    ):
        runpy.run_path(words[0], run_name="__main__")
    if ended.called:
        [status] = ended.call_args.args
    return Done(status, out.getvalue(), errors.getvalue())
