"""Whether every sample was fed once an epoch, counted from the ids alone: knows nothing of the order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pretrain.history.proof.finding import Faults, Finding, counted

Ids = NDArray[np.int64]


class Epochs:
    """Counts ids epoch by epoch: the samples at positions [e·N, (e + 1)·N) of the run, a step being B positions.

    Batches wrap over an epoch's end: a step may end one epoch and begin the next.
    """

    def __init__(self, samples: int, ids: int, trained: Ids | None) -> None:
        """
        Args:
            samples: N, of an epoch.
            ids: canonical ids are below this. Takes a byte for each.
            trained: those among them that an epoch is of; None: all.
        """
        self._samples = samples
        self._seen = np.zeros(ids, bool)
        self._held: NDArray[np.bool_] | None = None
        if trained is not None:
            self._held = np.ones(ids, bool)
            self._held[trained] = False
        self._epoch, self._fed = 0, 0  # the epoch under way, and ids fed in it
        self._whole = 0  # epochs of which each sample was seen once
        self._gaps: list[int] = []  # epochs of which the audit lacks ids
        self._faults, self._held_faults = Faults(), Faults()

    def feed(self, position: int, ids: Ids, where: str) -> None:
        """Count ids that were fed from `position` on."""
        while len(ids):
            epoch, place = divmod(position, self._samples)
            if epoch != self._epoch:
                self._close()
                self._gaps += range(self._epoch + 1, epoch)
                self._epoch, self._fed = epoch, 0
                self._seen[:] = False
            part = ids[: self._samples - place]
            self._count(part, where)
            position, ids = position + len(part), ids[len(part) :]

    def findings(self, end: int, claim: str, held_out: str | None) -> list[Finding]:
        """What holds of all that was fed.

        Args:
            end: the position that the run has come to.
            claim: that every sample comes once an epoch.
            held_out: that none comes which is held out; None: none is.
        """
        begun = self._epoch * self._samples
        if self._fed == self._samples:
            self._close()
            self._fed = 0
        elif self._fed < min(end - begun, self._samples):
            self._gaps.append(self._epoch)
        self._gaps += range(self._epoch + 1, -(-end // self._samples))  # of which there is no line at all
        gaps = ", ".join(map(str, self._gaps[:5])) + ("…" if len(self._gaps) > 5 else "")
        words = f"{counted(self._whole, 'whole epoch')} of {self._samples:,} samples"
        if self._fed:
            words += f", and {self._fed:,} different samples of epoch {self._epoch}, under way"
        lacking = [f"the audit lacks ids of epoch {gaps}"] if self._gaps else []
        found = [self._faults.finding(claim, words, lacking)]
        if held_out and self._held is not None:
            found.append(self._held_faults.finding(held_out, f"{int(self._held.sum()):,} samples", lacking))
        return found

    def _count(self, ids: Ids, where: str) -> None:
        outside = (ids < 0) | (ids >= len(self._seen))
        if outside.any():
            self._faults.add(f"{where}: id {ids[outside][0]} is no sample; 0 to {len(self._seen) - 1} would be right")
            ids = ids[~outside]
        if self._held is not None and self._held[ids].any():
            self._held_faults.add(f"{where}: id {ids[self._held[ids]][0]} is held out")
        values, counts = np.unique(ids, return_counts=True)
        again = values[self._seen[values] | (counts > 1)]
        if len(again):
            self._faults.add(f"{where}: id {again[0]} comes again in epoch {self._epoch}")
        self._seen[values] = True
        self._fed += len(ids) + int(outside.sum())

    def _close(self) -> None:
        """Judge the epoch that has ended."""
        if self._fed < self._samples:
            self._gaps.append(self._epoch)
            return
        lacking = ~self._seen if self._held is None else ~(self._seen | self._held)
        if lacking.any():
            count, first = int(lacking.sum()), int(lacking.argmax())
            self._faults.add(
                f"epoch {self._epoch}: id {first} is never fed" + (f", nor {count - 1} more" if count > 1 else "")
            )
            return
        self._whole += 1
