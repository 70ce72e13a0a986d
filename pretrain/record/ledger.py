"""What is written down of every step: the samples, the faults among them, the metrics, and what a skipped step saw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pretrain.engine.step import Agreement, Update
from pretrain.record.events import Events
from pretrain.record.folder import RunFolder
from pretrain.record.inspection import Inspection
from pretrain.record.lines import Lines
from pretrain.record.metrics import Metrics
from pretrain.record.pulse import Pulse
from pretrain.record.quarantine import Quarantine
from pretrain.stream.loader import Batch


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


class Ledger:
    """The books of a run, kept step by step. `close` flushes them."""

    def __init__(
        self, audit: Audit, quarantine: Quarantine, metrics: Metrics, inspection: Inspection, events: Events
    ) -> None:
        self._audit, self._quarantine, self._metrics, self._inspection = audit, quarantine, metrics, inspection
        self._events = events

    def add(self, batch: Batch) -> None:
        """Note a micro-batch that is trained on: its ids, and the samples in it that could not be read."""
        self._audit.add(batch.ids)
        self._quarantine.add(batch)

    @property
    def faulty(self) -> bool:
        """Whether this rank has found samples that cannot be read in the step under way."""
        return self._quarantine.pending

    def check(self, step: int) -> None:
        """Write down the faults of all ranks in `step` (from 0). Collective, called where any rank is `faulty`.

        Raises:
            InputError: a chunk could not be read (StorageError: for now), or too many samples; on every rank.
        """
        self._quarantine.write(step)

    def inspect(self, step: int, loss: float, reason: str) -> None:
        """Keep the state before `step` and this rank's batch and mean loss, for whoever asks why. Collective."""
        self._inspection.keep(step, self._audit.ids, loss, reason)

    def step(self, step: int, agreed: Agreement, update: Update, pulse: Pulse) -> None:
        """Close `step` (from 0): its audit line, and its metrics where they are due. Collective."""
        self._audit.step(step)
        if update.skipped is not None:
            self._events.add("skipped", step + 1, reason=update.skipped)
        self._metrics.step(step + 1, agreed.loss, update, pulse)

    def close(self) -> None:
        """Flush and close the files."""
        try:
            self._audit.close()
        finally:
            self._metrics.close()
