"""The audit of a run against the order of its samples: what was fed, step by step, over all ranks and restarts."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from pretrain import files
from pretrain.history.proof.epochs import Epochs
from pretrain.history.proof.finding import UNKNOWN, Faults, Finding, counted
from pretrain.history.proof.span import Span, start_of
from pretrain.progress import Progress
from pretrain.record.folder import AUDIT, RunFolder
from pretrain.stream.order import Order

STEPS = "no step is missing, doubled or out of order in the audit"
IDS = "the ids are those of `shards.py order`, on any ranks"
ONCE = "every sample is fed exactly once an epoch"
HELD_OUT = "no sample that is held out is fed"

_BLOCK = 1 << 16  # positions of the order that are computed together
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Expected:
    """What the audit is compared with.

    Args:
        order: of the samples; None where neither a checkpoint nor an index tells it.
        trained: the canonical ids that the order is of; None: all.
        samples: how many canonical ids there are.
        unknown: why `order` is None.
    """

    order: Order | None
    trained: Ids | None = None
    samples: int = 0
    unknown: str = ""


@dataclass(frozen=True)
class AuditLine:
    """A line of a rank's file: its number from 1, its step from 0, and the ids."""

    number: int
    step: int
    ids: Ids


class AuditFile:
    """One rank's file, read line by line and hashed on the way. A torn last line is none."""

    def __init__(self, path: Path, rank: int, faults: Faults) -> None:
        self.rank, self.name = rank, f"{AUDIT}/{path.name}"
        self._file = path.open("rb")
        self._faults, self._digest = faults, hashlib.sha256()
        self._lines = self._read()
        self._ahead: list[AuditLine] = []
        self._before: AuditLine | None = None  # the last one taken

    def at(self, step: int) -> AuditLine | None:
        """The line of `step`; None where there is none. Steps are asked for in ascending order."""
        while (line := self._peek(0)) is not None and line.step != step:
            after = self._peek(1)
            if line.step > step and (after is None or after.step > line.step):
                return None
            before = f", after one of step {self._before.step}" if self._before else ""
            self._faults.add(
                f"{self.name}, line {line.number}: step {line.step}{before}; each step once, ascending, would be right"
            )
            self._ahead.pop(0)
        if line is not None:
            self._before = self._ahead.pop(0)
        return line

    @property
    def ended(self) -> bool:
        """Whether no line is left."""
        return self._peek(0) is None

    def place(self, step: int) -> str:
        """Where the line of `step` should be."""
        line = self._peek(0)
        return f"{self.name}, line {self._before.number + 1 if self._before else 1}" + (
            f": step {line.step}, step {step} would be right" if line else f": the file ends before step {step}"
        )

    @property
    def sha256(self) -> str:
        """Of what was read."""
        return self._digest.hexdigest()

    def __enter__(self) -> AuditFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _peek(self, ahead: int) -> AuditLine | None:
        while len(self._ahead) <= ahead:
            line = next(self._lines, None)
            if line is None:
                return None
            self._ahead.append(line)
        return self._ahead[ahead]

    def _read(self) -> Iterator[AuditLine]:
        for number, raw in enumerate(self._file, start=1):
            if not raw.endswith(b"\n"):
                return
            self._digest.update(raw)
            try:
                line = json.loads(raw)
                step, ids = line["step"], np.array(line["ids"], dtype=np.int64)
                if type(step) is not int or ids.ndim != 1:
                    raise TypeError
            except (ValueError, KeyError, TypeError, OverflowError):
                self._faults.add(
                    f'{self.name}, line {number}: cannot be read; {{"step": t, "ids": […]}} would be right'
                )
                continue
            yield AuditLine(number, step, ids)


def audit_files(folder: RunFolder) -> dict[int, Path]:
    """The audit's files, by rank."""
    place = folder.path / AUDIT
    names = os.listdir(place) if files.exists(place) else []
    found = {int(match[1]): place / name for name in names if (match := re.fullmatch(r"rank_(\d+)\.jsonl", name))}
    return dict(sorted(found.items()))


class AuditCheck:
    """Walks through the audit's files together, step by step, and compares."""

    def __init__(self, folder: RunFolder, expected: Expected, spans: Sequence[Span], completed: int) -> None:
        """
        Args:
            spans: what stands of the run's loops; empty where no events tell.
            completed: steps that checkpoints or events say were completed: their lines must be there.
        """
        self._paths = audit_files(folder)
        self._expected, self._spans, self._completed = expected, spans, completed
        self._steps, self._ids = Faults(), Faults()
        self._epochs = Epochs(expected.order.samples, expected.samples, expected.trained) if expected.order else None
        self._lines = self._wrong = self._off = 0  # lines compared, and of wrong ids; steps that kept no audit
        self._ranks: list[int] = []  # numbers of ranks, as they came
        self.judged = 0  # steps
        self.hashes: dict[str, str] = {}

    def findings(self, until: int) -> list[Finding]:
        """What holds of the audit. `until`: about how many steps there are, for the progress."""
        unknown = self._expected.unknown
        if not self._paths:
            kept = any(span.start.get("audit") for span in self._spans)
            if kept and self._completed:
                self._steps.add(f"{AUDIT}/rank_00000.jsonl: no such file, but the run kept an audit")
            why = "there is no audit" + ("" if kept else " (data.audit was false)")
            found = [self._steps.finding(STEPS, "", [why])]
            return [*found, *(Finding(claim, UNKNOWN, why) for claim in self._claims)]
        with ExitStack() as stack:
            opened = [stack.enter_context(AuditFile(path, rank, self._steps)) for rank, path in self._paths.items()]
            with Progress("reading the audit", "steps", max(until, 1)) as progress:
                self._walk({file.rank: file for file in opened}, progress)
            self.hashes = {file.name: file.sha256 for file in opened}
        off = [f"{counted(self._off, 'step')} kept no audit"] if self._off else []
        *several, ranks = sorted(set(self._ranks)) or [0]
        on = f"{', '.join(map(str, several))} and {ranks} ranks" if several else counted(ranks, "rank")
        words = f"steps 0 to {self.judged - 1:,} on {on}, {counted(self._lines, 'line')}"
        found = [self._steps.finding(STEPS, words if self.judged else "no step was completed", off)]
        if self._epochs is None or self._expected.order is None:
            return [*found, *(Finding(claim, UNKNOWN, unknown) for claim in self._claims)]
        found.append(self._ids.finding(IDS, f"{self._lines - self._wrong:,} of {self._lines:,} lines", off))
        end = self.judged * self._expected.order.global_batch
        found += self._epochs.findings(end, ONCE, HELD_OUT if self._expected.trained is not None else None)
        return found

    @property
    def _claims(self) -> list[str]:
        return [IDS, ONCE, *([HELD_OUT] if self._expected.trained is not None else [])]

    def _walk(self, opened: dict[int, AuditFile], progress: Progress) -> None:
        blocks = self._blocks()
        lost: set[int] = set()  # ranks whose file is not there at all
        for step in itertools.count():
            start = start_of(self._spans, step)
            lines = {rank: line for rank, file in opened.items() if (line := file.at(step)) is not None}
            ranks = start.get("ranks") or self._implied(lines)
            if step >= self._completed and len(lines.keys() & range(ranks)) < ranks:
                missing = [rank for rank in range(ranks) if rank not in lines]
                if any(rank not in opened or opened[rank].ended for rank in missing):
                    break  # the run was cut off here, or is going on
            ids = next(blocks)
            progress.advance()
            self.judged = step + 1
            before_events = bool(self._spans) and not start  # whether these steps kept an audit was not recorded
            if not lines and (before_events or start.get("audit") is False):
                self._off += 1
                continue
            if not self._ranks or self._ranks[-1] != ranks:
                self._ranks.append(ranks)
            for rank in range(ranks):
                if rank in lines:
                    self._compare(opened[rank], lines[rank], rank, ranks, ids)
                elif rank in opened:
                    self._steps.add(opened[rank].place(step))
                elif rank not in lost:
                    lost.add(rank)
                    self._steps.add(
                        f"{AUDIT}/rank_{rank:05d}.jsonl: no such file; step {step} was trained on {ranks} ranks"
                    )
            for rank in sorted(lines.keys() - set(range(ranks))):
                self._steps.add(
                    f"{opened[rank].name}, line {lines[rank].number}: step {step} was trained on {ranks} ranks; "
                    "no line would be right"
                )

    def _implied(self, lines: dict[int, AuditLine]) -> int:
        """How many ranks trained a step, by the size of their shares."""
        order = self._expected.order
        sizes = [len(line.ids) for line in lines.values() if len(line.ids)]
        if order is None or not sizes:
            return max([*lines, -1]) + 1 or (self._ranks[-1] if self._ranks else max(self._paths) + 1)
        return max(order.global_batch // max(set(sizes), key=sizes.count), 1)

    def _blocks(self) -> Iterator[Ids | None]:
        """The expected ids of step 0, 1, …; several steps are computed together."""
        order, trained = self._expected.order, self._expected.trained
        if order is None:
            yield from itertools.repeat(None)
            return
        steps = max(_BLOCK // order.global_batch, 1)
        for first in itertools.count(step=steps):
            begin, end = first * order.global_batch, (first + steps) * order.global_batch
            ids = order.at(np.arange(begin, end, dtype=np.int64))
            yield from (ids if trained is None else trained[ids]).reshape(steps, order.global_batch)

    def _compare(self, file: AuditFile, line: AuditLine, rank: int, ranks: int, ids: Ids | None) -> None:
        """One rank's line with its slots of the global batch."""
        self._lines += 1
        if ids is None or self._epochs is None:
            return
        where, share = f"{file.name}, line {line.number}, step {line.step}", len(ids) // ranks
        right = ids[rank * share : (rank + 1) * share]
        self._epochs.feed(line.step * len(ids) + rank * share, line.ids, where)
        if len(line.ids) != share:
            self._wrong += 1
            self._ids.add(f"{where}: {len(line.ids)} ids; {share}, of {len(ids)} on {ranks} ranks, would be right")
        elif not np.array_equal(line.ids, right):
            self._wrong += 1
            places = np.flatnonzero(line.ids != right)
            at = int(places[0])
            more = f" ({len(places) - 1} more in this line)" if len(places) > 1 else ""
            self._ids.add(f"{where}, position {at}: id {line.ids[at]}, {right[at]} would be right{more}")
