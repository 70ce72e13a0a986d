"""What happened to a run and when, over all its starts."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from pretrain.ranks.collectives import World
from pretrain.record.folder import RunFolder
from pretrain.record.lines import Lines


class Events:
    """`events.jsonl`: a line for each event, written by rank 0. A resume takes none of them back.

    Each line holds `at` (seconds since 1970), `event`, `step` (completed steps), and what the event is told with:

    - start: a run is about to be built; `began`, when its process did, and `training.setup.machines`
    - train: the loop begins
    - saved, unsaved: a checkpoint is whole, after `seconds`; or could not be written, and the `reason`
    - skipped: an update was left out, and the `reason`
    - left: the loop has ended; `time/…` as in metrics.jsonl, since the last line there
    - rollback: the run goes back to a checkpoint before `step`, and the `reason`
    - finished, stopped, failed: the last event of a start, and the `reason`; one that was killed has none

    As a context manager it writes down what the block failed with.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        self._lines = Lines(folder.events) if world.main else None
        self.step = 0  # of the last event

    def add(self, event: str, step: int, **besides: Any) -> None:
        """Write a line; nothing on ranks other than 0."""
        self.step = step
        if self._lines is not None:
            self._lines.add({"at": round(time.time(), 3), "event": event, "step": step, **besides})

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.add("failed", self.step, reason=f"{type(error).__name__}: {error}")
        if self._lines is not None:
            self._lines.close()
