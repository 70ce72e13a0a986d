"""What happened to a run and when, over all its starts; and the clock that a run writes by."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from pretrain.errors import StorageError
from pretrain.ranks.collectives import World, together
from pretrain.record.folder import RunFolder
from pretrain.record.lines import Lines

_AHEAD = time.time() - time.monotonic()


def now() -> float:
    """The time, in seconds since 1970, to milliseconds.

    Within a process it only goes forward: when the host's clock is set meanwhile, this one goes on as it was.
    """
    return round(_AHEAD + time.monotonic(), 3)


def process_began() -> float:
    """When this process began, by the same clock, to 10 ms.

    In a notebook or at a prompt it is now: that process began for other things, maybe hours ago.
    """
    if not hasattr(sys.modules["__main__"], "__file__"):
        return now()
    stat = Path("/proc/self/stat")
    if not stat.exists():  # not Linux
        return round(psutil.Process().create_time(), 3)
    # By the time since the kernel booted: psutil takes the time of booting in whole seconds.
    fields = stat.read_text().rpartition(")")[2].split()  # from the third of proc_pid_stat(5) on
    since_boot = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
    return round(now() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot), 3)


class Events:
    """`events.jsonl`: a line for each event, written by rank 0. A resume takes none of them back.

    Each line holds `at` (seconds since 1970), `event`, `step` (completed steps), and what the event is told with:

    - start: a run is about to be built; `began`, when its process did, and `training.setup.machines`
    - train: the loop begins
    - saved, unsaved: a checkpoint is whole, after `seconds`; or could not be written, and the `reason`
    - skipped: an update was left out, and the `reason`
    - left: the loop has ended; `time/…` as in metrics.jsonl, since the last line there
    - rollback: the run goes back to a checkpoint before `step`, and the `reason`
    - finished, stopped, failed: the last event of a start, and the `reason`; one that was killed has none. Storage that
      does not answer stops a run: the same command resumes it

    As a context manager it writes down what the block failed with.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        """Collective."""
        together(lambda: folder.mend_events() if world.main else None)
        self._lines = Lines(folder.events) if world.main else None
        self.step = 0  # of the last event

    def add(self, event: str, step: int, **besides: Any) -> None:
        """Write a line; nothing on ranks other than 0."""
        self.step = step
        if self._lines is not None:
            self._lines.add({"at": now(), "event": event, "step": step, **besides})

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            ended = "stopped" if isinstance(error, StorageError) else "failed"
            self.add(ended, self.step, reason=f"{type(error).__name__}: {error}")
        if self._lines is not None:
            self._lines.close()
