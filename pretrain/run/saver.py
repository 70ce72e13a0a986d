"""When a run saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pretrain.engine import checkpoint
from pretrain.engine.distributed import World, any_rank
from pretrain.run.folder import RunFolder


class Saver:
    """Saves every so many steps, every so many minutes, and whenever it is told to."""

    def __init__(
        self,
        engine: Any,
        folder: RunFolder,
        world: World,
        state: Callable[[int], dict[str, Any]],
        *,
        every: int | None,
        every_minutes: float | None,
        keep: int,
    ) -> None:
        """`state`: what a checkpoint after so many steps must hold besides parameters and optimizer."""
        self._engine, self._folder, self._world, self._state = engine, folder, world, state
        self._every, self._keep = every, keep
        self._seconds = every_minutes * 60 if every_minutes else float("inf")
        self._saved_at = time.monotonic()

    def maybe(self, done: int, now: bool = False) -> None:
        """Save after `done` steps if one is due, or `now`. Collective."""
        due = now or (self._every is not None and done % self._every == 0)
        if not due and self._seconds < float("inf"):
            # The ranks' clocks differ; any one that is due takes the others along.
            due = any_rank(time.monotonic() - self._saved_at >= self._seconds, self._world.device)
        if not due:
            return
        began = time.monotonic()
        path = checkpoint.save(self._engine, self._folder.checkpoints, done, self._state(done), self._world)
        if self._world.main:
            checkpoint.prune(self._folder.checkpoints, self._keep)
            print(f"saved {path} in {time.monotonic() - began:.1f} s", flush=True)
        self._saved_at = time.monotonic()
