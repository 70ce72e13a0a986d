"""Samples that could not be read: written down, counted, and too many of them end the run."""

from __future__ import annotations

import math
from typing import Any

from pretrain.console import say
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.ranks.collectives import World, all_gather_list
from pretrain.record.folder import RunFolder
from pretrain.record.lines import Lines
from pretrain.stream.fault import Fault, first_fault
from pretrain.stream.loader import Batch
from pretrain.stream.section import DataSection

# The rate is taken over about so many recent images: a run's first bad image is no rate, and storage that fails after
# months must not be averaged over the months.
_WINDOW_IMAGES, _WINDOW_STEPS = 10_000, 10


class Quarantine:
    """`quarantine.jsonl`: one line for each sample that was replaced by a grey, masked image, in the order of steps.

    The run ends, on every rank and with one message, at a chunk that cannot be read (unless
    `data.unreadable_chunks="quarantine"`), at a chunk that storage does not serve for now (its samples are good), and
    when the share of unreadable samples exceeds `data.max_unreadable`; older samples count ever less. It ends before
    the step is saved, so that it resumes from the checkpoint before.
    """

    def __init__(
        self,
        folder: RunFolder,
        index: Index,
        world: World,
        section: DataSection,
        global_batch: int,
    ) -> None:
        self._path, self._index, self._world = folder.quarantine, index, world
        self._lines = Lines(folder.quarantine)
        self._batch, self._window = global_batch, max(_WINDOW_IMAGES, _WINDOW_STEPS * global_batch)
        self._most, self._chunks = section.max_unreadable, section.unreadable_chunks == "quarantine"
        self._faults: list[Fault] = []
        self._recent, self._counted = 0.0, 0  # unreadable samples, older ones for less; the step they are counted up to
        self._told = False

    def add(self, batch: Batch) -> None:
        """Note the samples of a micro-batch that could not be read."""
        self._faults += batch.faults

    @property
    def pending(self) -> bool:
        """Whether this rank has something to report."""
        return bool(self._faults)

    def write(self, step: int) -> None:
        """Write down the faults of all ranks in step `step`, counted from 0. Collective.

        Raises:
            InputError: a chunk could not be read (StorageError: for now), or too many samples; the same on every rank.
        """
        faults = [fault for fault in self._faults if not fault.secondary]
        found = all_gather_list([{"step": step, **fault.record(self._index)} for fault in faults])
        ending = [fault for fault in self._faults if fault.passing or (fault.of_chunk and not self._chunks)]
        broken = all_gather_list(ending)
        if self._world.main and found:
            self._append(found, tell=not broken)
        if broken:
            fault = first_fault(broken)
            choice = ' (data.unreadable_chunks="quarantine" would continue without its samples)'
            raise fault.error(f"step {step + 1}: ", "" if fault.passing else choice)
        self._faults.clear()
        self._recent = self._recent * math.exp((self._counted - step) * self._batch / self._window) + len(found)
        self._counted = step
        if self._recent > self._most * self._window:
            raise InputError(
                f"step {step + 1}: {self._recent:.0f} of the last {self._window:,} images could not be read, above "
                f"data.max_unreadable={self._most:g}; {self._path} lists them, the last: {found[-1]['url']}, "
                f"byte {found[-1]['offset']}: {found[-1]['error']}"
            )

    def _append(self, records: list[dict[str, Any]], tell: bool) -> None:
        if tell and not self._told:
            self._told = True
            first = records[0]
            say(
                f"step {first['step'] + 1}: sample {first['id']} ({first['url']}, byte {first['offset']}) cannot be "
                f"read: {first['error']}; grey and masked. This and others: {self._path}"
            )
        self._lines.add(*records)
