"""When a run saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pretrain.engine import checkpoint
from pretrain.engine.distributed import World
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

    def due(self, done: int) -> bool:
        """Whether one is due after `done` steps by this rank's clock, which may differ from the others'."""
        if self._every is not None and done % self._every == 0:
            return True
        return time.monotonic() - self._saved_at >= self._seconds

    def save(self, done: int) -> None:
        """Save after `done` steps. Collective."""
        began = time.monotonic()
        path = checkpoint.save(self._engine, self._folder.checkpoints, done, self._state(done), self._world)
        if self._world.main:
            checkpoint.prune(self._folder.checkpoints, self._keep)
            print(f"saved {path} in {time.monotonic() - began:.1f} s", flush=True)
        self._saved_at = time.monotonic()
