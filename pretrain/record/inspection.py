"""What a step whose update was skipped looked like, so that someone can find out why."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

from pretrain import files
from pretrain.checkpoint import folder as checkpoints
from pretrain.console import say
from pretrain.ranks.collectives import World, broadcast_object
from pretrain.record.folder import RunFolder

_MOST = 3  # each is as large as a checkpoint


class Inspection:
    """`inspection/step_00000012/`: a checkpoint of the state before step 12 (from 0), and each rank's batch.

    `--init` takes the state as weights. The first few skipped steps of a run are kept.
    """

    def __init__(self, folder: RunFolder, world: World, save: Callable[..., bool]) -> None:
        self._folder, self._world, self._save = folder.inspection, world, save

    def keep(self, step: int, ids: list[int], loss: float, reason: str) -> None:
        """Keep the state before `step`, and of this rank the `ids` and the mean `loss` of its images. Collective."""
        if self._world.main:
            say(f"step {step + 1}: {reason}; its update is skipped")
        place, kept = checkpoints.step_path(self._folder, step), checkpoints.list_checkpoints(self._folder)
        if broadcast_object(place in kept or len(kept) >= _MOST):  # as rank 0 sees it
            return
        if not self._save(step, wait=True, folder=self._folder):
            return
        said = {"step": step, "reason": reason, "loss": str(loss), "ids": ids}
        with suppress(OSError):  # a disk that is full by now
            files.write_text(place / f"batch_{self._world.rank:05d}.json", json.dumps(said))
