"""What each rank trained on, sample by sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pretrain.record.folder import RunFolder
from pretrain.record.lines import Lines


class Audit:
    """`audit/rank_*.jsonl`: a line a step with the ids of all its micro-batches, in slot order; nothing if disabled."""

    def __init__(self, folder: RunFolder, rank: int, enabled: bool) -> None:
        self._lines: Lines | None = None
        if enabled:
            folder.audit(rank).parent.mkdir(parents=True, exist_ok=True)
            self._lines = Lines(folder.audit(rank))
        self.ids: list[int] = []  # of the step under way

    def add(self, ids: NDArray[np.int64]) -> None:
        """Note a micro-batch that has been trained on."""
        self.ids += ids.tolist()

    def step(self, step: int) -> None:
        """Write the line of step `step`, counted from 0 as in `shards.py order`."""
        if self._lines is not None:
            self._lines.add({"step": step, "ids": self.ids})
        self.ids = []

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()
