"""Requests to stop: signals, a file STOP in the run folder, a time limit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pretrain.console import say

if TYPE_CHECKING:  # `listen` comes before torch is there
    from pretrain.ranks.collectives import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


_early: list[str] = []  # signals that came before a `Stop` was made


def listen() -> None:
    """Remember SIGUSR1 from now on: it means "save, your time is up", and would kill a rank that is starting.

    The other signals may end such a rank: it has nothing to save.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: _early.append(signal.Signals(number).name))


class Stop:
    """Hears requests to stop. A second Ctrl-C ends the rank at once.

    A signal only sets a flag; the ranks exchange the flags between steps, so that all save the same step even if one
    has not received the signal yet.
    """

    def __init__(self, folder: Path, world: World, time_limit_minutes: float | None = None) -> None:
        self._folder, self._world = folder, world
        self._files = [folder / "STOP"]
        self._deadline = time.monotonic() + time_limit_minutes * 60 if time_limit_minutes else float("inf")
        self._reason = _early[0] if _early else None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def enter(self, run: Path) -> None:
        """Look for STOP in the folder of `run` too, which is one of several in `folder`."""
        self._files = [self._folder / "STOP", run / "STOP"]

    def asked(self) -> bool:
        """Whether this rank has been asked to stop."""
        if self._reason is None and self._world.main:
            # None also where the file system does not answer for now.
            found = next(filter(os.path.exists, self._files), None)
            if found is not None:
                self._reason = f"{found} exists"
            elif time.monotonic() > self._deadline:
                self._reason = "train.time_limit_minutes is reached"
        return self._reason is not None

    @property
    def reason(self) -> str:
        """Why the run stops, as far as this rank knows."""
        return self._reason or "another rank was asked to stop"

    def done(self) -> None:
        """Call when the stop has been carried out: removes STOP, so that the same command resumes."""
        if self._world.main:
            for file in self._files:
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:  # a folder; another's, where each may remove their own alone
                    say(f"{file}: cannot be removed: {error.strerror}; it will stop the next start, too")
