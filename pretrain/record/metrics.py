"""What a run measures of itself: the progress line, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.console import say
from pretrain.engine.step import Update
from pretrain.page.text import duration_text, number_text
from pretrain.plan.measured import Comparison
from pretrain.ranks.collectives import World, all_gather_list, gather_rows, together
from pretrain.record.events import now
from pretrain.record.folder import RunFolder
from pretrain.record.lines import Lines
from pretrain.record.pulse import Pulse, Window
from pretrain.record.section import TELLING, LoggingSection
from pretrain.stream.counters import Counters

# Where a rank's data spend their time: thread-milliseconds per image.
_PARTS = ("read", "starved", "decode", "augment", "collate")

# A step begins with work that waits for nobody: the data, then the forward pass. What comes after holds collectives, in
# which all ranks take as long as the slowest. (ZeRO 3 gathers parameters in the forward pass already: there only the
# data tell the ranks apart.)
PARTS = ("data", "forward")


@dataclass(frozen=True)
class Workload:
    """What the rates and shares in the metrics are of."""

    steps: int  # of the whole run
    global_batch: int
    samples: int  # in the training set
    flops_per_image: int  # of a training step, forward and backward
    peak_flops: float | None  # of this rank's device, the denominator of MFU; None: not known, and MFU is left out


class Metrics:
    """Counts steps and time between the steps that are logged; rank 0 writes what all ranks measured.

    Args:
        counters: of this rank's loader.
        memory: of this rank, beside its plan; None: not measured.
        start: steps completed before.
        skipped: updates that were skipped before.
    """

    def __init__(
        self,
        folder: RunFolder,
        world: World,
        section: LoggingSection,
        workload: Workload,
        counters: Counters,
        *,
        memory: Comparison | None = None,
        start: int = 0,
        skipped: int = 0,
    ) -> None:
        """Collective."""
        self._memory, self._compared, self._logged = memory, False, 0  # lines since the start
        self._counters, self._counted = counters, counters.seen()
        self._world, self._every, self._of = world, section.every, workload
        peaks = [peak for peak in all_gather_list([workload.peak_flops]) if peak is not None]
        self._peak = sum(peaks) if len(peaks) == world.size else None
        self._lines = Lines(folder.metrics, checked=world.main)  # rank 0's
        self._writer: Any = None
        if section.tensorboard:
            self._writer = together(lambda: _writer(folder, start) if world.main else None)
        self._hosts = all_gather_list([socket.gethostname()])
        self._steps, self._skipped = 0, skipped  # steps since the last line; updates skipped in the whole run

    def step(self, done: int, loss: float, update: Update, pulse: Pulse) -> None:
        """Count a step, the `done`-th (from 1); log it where it is due. Collective.

        Args:
            loss: the mean over the global batch.
            pulse: measured this rank's time.
        """
        self._steps += 1
        self._skipped += update.skipped is not None
        if done % self._every and done != self._of.steps:
            return
        window, batch = pulse.window(), self._of.global_batch
        shared = self._gather(window)
        rate = self._steps * batch / window.seconds
        beside_plan = self._compare(shared, window.seconds / self._steps, last=done == self._of.steps)
        self._log(
            done,
            (self._of.steps - done) * window.seconds / self._steps,
            {
                "images": done * batch,
                "epoch": done * batch / self._of.samples,
                "loss": loss,
                "lr": update.lr,
                "grad_norm": update.grad_norm,
                "images_per_second": rate,
                "mfu": self._mfu(rate),
                **shared,
                **({"updates_skipped": self._skipped} if self._skipped else {}),
                **beside_plan,
            },
        )
        if beside_plan and self._memory is not None:
            self.say(self._memory.line(beside_plan))
        self._steps = 0
        self._logged += 1

    def _compare(self, shared: dict[str, Any], step_seconds: float, *, last: bool) -> dict[str, float]:
        """What the run takes beside its plan, on rank 0 once after a start: in the second line, as the first has what
        is compiled and read ahead at the beginning; or in the run's last line. Else empty.
        """
        if self._memory is None or self._compared or not (self._logged == 1 or last) or not shared:
            return {}
        self._compared = True
        return self._memory.values(shared["memory/peak"], shared.get("memory/reserved"), step_seconds)

    def _mfu(self, rate: float) -> float | None:
        """The model's operations at `rate` images/s over the devices' peak; None where that is not known."""
        if self._peak is None:
            return None
        done = rate * self._of.flops_per_image
        if done <= self._peak:
            return done / self._peak
        self.say(
            f"note: {done / 1e12:.3g} TFLOP/s are more than the {self._peak / 1e12:.3g} that the devices are said to "
            "reach; MFU is left out, logging.peak_tflops (per device) sets the peak"
        )
        self._peak = None
        return None

    def _gather(self, window: Window) -> dict[str, Any]:
        """What the ranks' data and forward passes took in this window: on rank 0, else empty. Collective."""
        seen = self._counters.seen()
        did = {name: amount - self._counted[name] for name, amount in seen.items()}
        self._counted = seen
        images = self._steps * self._of.global_batch / self._world.size
        each = [1000 * did[f"{part}_seconds"] / max(did["images"], 1) for part in _PARTS]
        waited = window.waited
        mine = [*each, 1000 * waited / images, waited, window.forward, did["bytes_read"], seen["unreadable"]]
        mine += [0, 0] if self._memory is None else [self._memory.meter.peak(), self._memory.meter.reserved() or 0]
        rows = gather_rows(torch.tensor([mine], dtype=torch.float64, device=self._world.device))
        if rows is None:
            return {}
        *parts, waits, forwards, read, unreadable, peaks, reserved = rows.T.tolist()
        values: dict[str, Any] = {
            "data_wait": max(waits) / window.seconds,
            **window.times(max(waits)),
            "data/bytes_per_second": sum(read) / window.seconds,
            "data/unreadable": sum(unreadable),
            **({"memory/peak": round(max(peaks))} if any(peaks) else {}),
            **({"memory/reserved": round(max(reserved))} if any(reserved) else {}),
        }
        for part, of_ranks in zip((*_PARTS, "wait"), parts, strict=True):
            values |= {
                f"data/{part}_ms": sum(of_ranks) / self._world.size,
                f"data/{part}_ms_worst": max(of_ranks),
            }
        if self._world.size > 1:
            found = slowest(list(zip(waits, forwards, strict=True)))
            values |= {
                "straggler/rank": found.rank,
                "straggler/host": self._hosts[found.rank],
                "straggler/part": found.part,
                "straggler/excess": found.excess,
            }
        return values

    def evaluated(self, done: int, values: dict[str, float], pulse: Pulse) -> None:
        """Write down what the evaluators found after `done` steps, and the pauses that `pulse` measured up to now."""
        pauses = pulse.pauses()
        if not self._world.main:
            return
        self.say(f"step {done}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self._write(done, {**values, **pauses})

    @property
    def check(self) -> str:
        """The running check of metrics.jsonl; empty on ranks other than 0."""
        return self._lines.check

    def say(self, line: str) -> None:
        """A line on rank 0's console."""
        if self._world.main:
            say(line)

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        if self._writer is not None:
            self._writer.close()

    def _log(self, done: int, seconds_left: float, values: dict[str, Any]) -> None:
        if not self._world.main:
            return
        width = len(str(self._of.steps))
        line = (
            f"step {done:>{width}}/{self._of.steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad {number_text(values['grad_norm'])}  {number_text(values['images_per_second'])} images/s  "
            f"data wait {values['data_wait']:.0%}  "
            + (f"MFU {values['mfu']:.1%}  " if values["mfu"] is not None else "")
            + f"{duration_text(seconds_left)} left"
        )
        if self._skipped:
            line += f"  {self._skipped} updates skipped"
        if values.get("straggler/excess", 0) > TELLING:
            rank, host, part, excess = (values[f"straggler/{key}"] for key in ("rank", "host", "part", "excess"))
            line += f"  rank {rank} ({host}) is slow: {part} ×{excess:.2f}"
        self.say(line)
        self._write(done, values)

    def _write(self, done: int, values: dict[str, Any]) -> None:
        self._lines.add({"step": done, **values, "at": now()})
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name if "/" in name else f"train/{name}", value, done)
            self._writer.flush()
        except OSError as error:  # its writer cannot continue after one; metrics.jsonl does
            self.say(f"tensorboard: {error.strerror or error}; no more is written there until the run is resumed")
            self._writer = None


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, the part in which it is, and its time over the median rank's."""

    rank: int
    part: str
    excess: float


def slowest(times: Sequence[Sequence[float]]) -> Straggler:
    """Who takes longest, given each rank's seconds for each of `PARTS`."""
    totals = [sum(of_rank) for of_rank in times]
    rank = max(range(len(totals)), key=totals.__getitem__)
    # The lower median: of two ranks, the quicker one is the measure.
    usual = [statistics.median_low(of_part) for of_part in zip(*times, strict=True)]
    _, part = max(zip((mine - other for mine, other in zip(times[rank], usual, strict=True)), PARTS, strict=True))
    return Straggler(rank, part, totals[rank] / max(statistics.median_low(totals), 1e-9))


def _writer(folder: RunFolder, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder.tensorboard), purge_step=start + 1)
