"""The rehearsal: a run is measured, killed, restored, stopped and exported on its machines, in a scratch folder."""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.step import Checkpoint
from pretrain.console import say
from pretrain.engine.layout import Layout, batch_layout
from pretrain.errors import InputError
from pretrain.page.text import bytes_text, duration_text
from pretrain.ranks.collectives import World, all_gather_list, barrier, on_main, together
from pretrain.record.claim import claimed
from pretrain.record.folder import CONFIG, RunFolder
from pretrain.rehearsal import judge
from pretrain.rehearsal.children import Children
from pretrain.rehearsal.findings import SCRATCH, Finding, Report
from pretrain.rehearsal.judge import Limits, Losses
from pretrain.rehearsal.measure import figures_path
from pretrain.training.config import RunConfig

# Steps completed: at the first save, at the kill amid the second one, and at the request to stop.
_SAVED, _KILLED, _STOPPED = 2, 4, 5
_LONGEST_END = 600.0  # seconds that a run may take to end after SIGTERM
_LAST_WRITES = 5.0  # seconds in which ranks that other ranks of the rehearsal kill may still write
_NEVER = 10**9  # steps
_QUIET = ("logging.every=1", "logging.tensorboard=false", "train.time_limit_minutes=null")


@dataclass(frozen=True)
class Commands:
    """What the ranks run, as words of a command line without the run folder."""

    measure: Sequence[str]  # followed by the folder for the figures
    train: Sequence[str]  # followed by --out, a folder, and overrides


@dataclass
class Rehearsal:
    """A rehearsal under way: the parts in their order. Its methods are collective."""

    config: RunConfig
    commands: Commands
    out: Path
    world: World
    limits: Limits
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)  # the same on every rank
    _ranks: list[dict[str, Any]] = field(default_factory=list)  # figures of each rank

    def run(self, *, keep: bool = False) -> Report:
        """Go through all parts; the report, the same on every rank, is written to `out`.

        Args:
            keep: leave the scratch folder there.

        Raises:
            InputError: `out` is no place for a rehearsal.
        """
        began, scratch = time.monotonic(), self.out / SCRATCH
        together(lambda: self._check_out() if self.world.main else None)
        together(lambda: files.make_folder(self.out))
        with claimed(self.out, self.world), _removed(scratch, self.world, keep=keep), _logs(keep) as logs:
            together(lambda: _visible(scratch))
            room = on_main(lambda: shutil.disk_usage(scratch).free)
            parts: list[tuple[str, float, Callable[[], None]]] = [  # with a guess of how long each is to the others
                ("memory, steps, loader and storage", 3, lambda: self._measure(logs)),
                ("a run is killed while it saves", 2, lambda: self._kill(scratch, logs, room)),
                ("it is restored on fewer ranks", 2, lambda: self._restore_fewer(scratch, logs)),
                ("it is restored, evaluates and is asked to stop", 2.5, lambda: self._restore(scratch, logs)),
                ("its weights are exported", 0.5, lambda: self._export(scratch)),
            ]
            self._say(f"rehearsing {self.config.name} in {self.out}; output of the ranks: {logs}")
            for number, (doing, _, part) in enumerate(parts):
                done, left = (sum(weight for _, weight, _ in some) for some in (parts[:number], parts[number:]))
                spent = time.monotonic() - began
                about = f", about {duration_text(spent / done * left)} left" if done else ""
                self._say(f"part {number + 1} of {len(parts)}, after {duration_text(spent)}{about}: {doing}")
                part()
        report = Report(
            self.config.name,
            self.world.size,
            len(set(all_gather_list([socket.gethostname()]))),
            self._figures.get("device", "device not known"),
            time.monotonic() - began,
            self.findings,
            {**self.measured, "ranks": self._ranks},
        )
        written = on_main(lambda: report.write(self.out))
        self._say(f"{report.text()}\nwritten: {', '.join(map(str, written))}")
        return report

    @property
    def _layout(self) -> Layout:
        return batch_layout(self.config.train.global_batch, self.config.train.micro_batch, self.world.size)

    @property
    def _figures(self) -> dict[str, Any]:
        """Of rank 0; empty where it could measure nothing."""
        return self._ranks[0] if self._ranks else {}

    def _measure(self, logs: Path) -> None:
        """Memory, steps, loader and storage, in a run that is built for this alone."""
        with Children(self.world, [*self.commands.measure, str(logs)], logs / "measure.txt", self.world.size) as run:
            run.until(lambda: False)
            failure = "" if run.ended(math.inf) and set(run.statuses()) == {0} else run.failure()
        self._ranks = all_gather_list([_read(figures_path(logs, self.world.rank))])
        if "plan" in self._figures:
            self.findings.append(judge.planned_memory(self._figures, self.limits))
        self.findings.append(judge.worst_step(self._ranks, self.limits, failure))
        for part, key, judged in (
            ("loader", "live_images_per_second", lambda: judge.loader(self._ranks, self.limits)),
            ("storage", "read_bytes_per_second", lambda: judge.storage(self._ranks)),
        ):
            if all(key in rank for rank in self._ranks):
                self.findings.append(judged())
            else:
                self._skip(part, "the steps before it failed")

    def _kill(self, scratch: Path, logs: Path, room: int) -> None:
        """Start a run, and kill it while it writes its second checkpoint."""
        run, section = RunFolder(scratch), self.config.checkpoint
        saving = (f"checkpoint.every={_SAVED}", "checkpoint.every_minutes=null", *self._evaluating(_NEVER))

        def amid_a_save() -> bool:
            begun = (
                checkpoints.partial_path(run.checkpoints, _KILLED),
                checkpoints.step_path(run.checkpoints, _KILLED),
            )
            return bool(self._saved(run)) and any(map(files.exists, begun))

        with self._started(scratch, logs / "killed.txt", *saving) as ranks:
            there = ranks.until(lambda: amid_a_save() or bool(_events(run, "unsaved")))
            ranks.kill()
            why = "" if there else ranks.failure()
        saved = on_main(lambda: self._saved(run))
        unsaved = on_main(lambda: next((line["reason"] for line in _events(run, "unsaved")), ""))
        if not saved:
            change = "room on the disk of --out" if "room" in f"{why}{unsaved}" else "what the message names"
            self.findings.append(Finding("save", why or unsaved, "a checkpoint", "fails", change))
            return
        took = on_main(lambda: next(line["seconds"] for line in _events(run, "saved")))
        self.measured |= {
            "save_seconds": took,
            "checkpoint_bytes": saved["bytes"],
            "losses": on_main(lambda: _losses(run)),
        }
        copies = section.keep + 1 + (section.best is not None)
        self.findings.append(judge.save(took, saved["bytes"], room, copies))
        # The next starts resume from the first one, so that steps which this run has made are made again.
        on_main(lambda: checkpoints.remove_after(run.checkpoints, _SAVED))

    def _restore_fewer(self, scratch: Path, logs: Path) -> None:
        """Restore on fewer ranks, and make the killed run's last steps again."""
        part, fewer = "restore on fewer ranks", self._fewer()
        if not self._restorable(part):
            return
        if fewer is None:
            return self._skip(part, "one rank, or no fewer that divide the global batch")
        self._again(f"restore on {fewer} of {self.world.size} ranks", scratch, logs / "fewer.txt", fewer)

    def _restore(self, scratch: Path, logs: Path) -> None:
        """Restore on the same ranks, make the last steps again, evaluate, and ask it to stop."""
        if not self._restorable("restore"):
            for part in ("evaluation", "few-shot", "signal"):
                self._skip(part, "no checkpoint")
            return
        self._again("restore", scratch, logs / "restored.txt", self.world.size, then=self._evaluate_and_stop)

    def _again(
        self,
        part: str,
        scratch: Path,
        log: Path,
        count: int,
        then: Callable[[RunFolder, Children], None] | None = None,
    ) -> None:
        """Restore the killed run on `count` ranks, compare the steps that it makes again, `then` go on or kill it."""
        run = RunFolder(scratch)
        before = on_main(lambda: len(_events(run, "train")))
        every = (
            "checkpoint.every=null",
            "checkpoint.every_minutes=null",
            *self._evaluating(_KILLED if then else _NEVER),
        )
        micro = f"train.micro_batch={self._layout.micro_batch}"  # fewer ranks take more of them
        with self._started(scratch, log, *every, micro, count=count) as ranks:
            # Only once training has begun have the killed run's lines been taken back.
            if ranks.until(lambda: len(_events(run, "train")) > before and max(_losses(run), default=0) >= _KILLED):
                # Lines up to the checkpoint are still the killed run's own.
                reference = {step: loss for step, loss in self.measured["losses"].items() if step > _SAVED}
                found = on_main(lambda: _losses(run))
                same = count == self.world.size
                dropped = not same and max(self.config.model.dropout, self.config.model.drop_path) > 0
                half = self._figures.get("dtype") in ("bfloat16", "float16")
                self.findings.append(judge.continued(part, reference, found, half=half, dropped=dropped))
                if then is not None:
                    then(run, ranks)
            else:
                change = (
                    "do not start: a run that loses a node could not go on" if count < self.world.size else "the cause"
                )
                needed = f"the checkpoint of {self.world.size} ranks resumed by {count}"
                self.findings.append(Finding(part, ranks.failure(), needed, "fails", change))

    def _evaluate_and_stop(self, run: RunFolder, ranks: Children) -> None:
        config = self.config
        wanted = {
            "evaluation": bool(config.data.eval or config.data.held_out),
            "few-shot": config.fewshot is not None,
        }
        evaluates = any(wanted.values())

        def went_on() -> bool:
            return (not evaluates or run.evaluated(_KILLED)) and max(_losses(run), default=0) >= _STOPPED

        if not ranks.until(went_on):
            for part, there in wanted.items():
                if there:
                    self.findings.append(Finding(part, ranks.failure(), "scores", "fails", "what the message names"))
            return self._skip("signal", "the run had ended")
        scores = on_main(run.last_scores) if evaluates else {}
        seconds = on_main(lambda: _evaluating_seconds(run)) if evaluates else 0.0
        for part, there in wanted.items():
            if there:
                of_part = {name: v for name, v in scores.items() if name.startswith("fewshot/") == (part == "few-shot")}
                self.findings.append(judge.scores(part, of_part, seconds))
            else:
                self._skip(part, "the config has none")
        began = time.monotonic()
        ranks.send(signal.SIGTERM)
        ranks.ended(max(_LONGEST_END, 2 * self.limits.grace))
        took, statuses = on_main(lambda: time.monotonic() - began), ranks.statuses()
        self.measured |= {"stop_seconds": took}
        step = self._figures.get("step_seconds", 0.0)
        self.findings.append(judge.grace(took, step, self.measured["save_seconds"], statuses, self.limits))

    def _export(self, scratch: Path) -> None:
        """Export the newest checkpoint's weights to safetensors, read them again and compare."""
        if not self._restorable("export"):
            return
        from pretrain.weights.export import check, export
        from pretrain.weights.load import choose
        from pretrain.weights.read import FORMATS

        source = choose(scratch)  # collective

        def exported() -> Finding:
            file, began = scratch / "model.safetensors", time.monotonic()
            needed = "the outputs that its card expects"
            try:
                export(source, FORMATS["safetensors"], file)
                compared, _ = check(file)
            except (InputError, OSError) as error:  # a full disk too is a finding
                return Finding("export", str(error), needed, "fails", "what the message names")
            wrong = [one.output for one in compared if not one.right]
            took, most = time.monotonic() - began, max(one.difference for one in compared)
            size = bytes_text(file.stat().st_size)
            seen = f"{size} of safetensors written and compared in {took:.1f} s; outputs differ by {most:.1e} at most"
            return Finding("export", seen, needed, "fails" if wrong else "ok", ", ".join(wrong))

        self.findings.append(on_main(exported))

    def _started(self, scratch: Path, log: Path, *overrides: str, count: int | None = None) -> Children:
        words = [*self.commands.train, "--out", str(scratch), *_QUIET, *overrides]
        return Children(self.world, words, log, self.world.size if count is None else count)

    def _evaluating(self, every: int) -> list[str]:
        """Overrides by which a run evaluates every so many steps."""
        return [f"train.eval_every={every}", *([f"fewshot.every={every}"] if self.config.fewshot else [])]

    def _saved(self, run: RunFolder) -> dict[str, Any] | None:
        """The first checkpoint's size, once it is whole."""
        path = checkpoints.step_path(run.checkpoints, _SAVED)
        return {"bytes": Checkpoint.read(path).bytes} if files.exists(path) else None

    def _restorable(self, part: str) -> bool:
        """Whether there is a checkpoint to restore; `part` is told not to have been run where there is none."""
        if "losses" not in self.measured:
            self._skip(part, "no checkpoint")
        else:
            return True
        return False

    def _fewer(self) -> int | None:
        """The most ranks, fewer than there are, that the global batch divides among in the same micro-batches."""
        layout = self._layout
        counts = range(self.world.size // 2, 0, -1)
        return next((count for count in counts if layout.global_batch % (count * layout.micro_batch) == 0), None)

    def _skip(self, part: str, why: str) -> None:
        self.findings.append(Finding(part, why, "", "not run"))

    def _say(self, text: str) -> None:
        if self.world.main:
            say(text)

    def _check_out(self) -> None:
        there = [name for name in (CONFIG, "checkpoints") if files.exists(self.out / name)]
        if there:
            raise InputError(
                f"--out {self.out}: holds a run ({there[0]}); a folder of the rehearsal's own would be right, on the "
                f"same disk: {self.out.with_name(self.out.name + '-rehearsal')}"
            )


def meet() -> World:
    """This rank of the rehearsal. The ranks meet over gloo, so none of them touches its device."""
    import os

    import torch
    import torch.distributed as dist

    from pretrain.ranks.launcher import rank_variables
    from pretrain.ranks.rendezvous import announced

    mine = rank_variables(os.environ)
    os.environ.update(mine)
    if int(mine["WORLD_SIZE"]) > 1:
        with announced({**os.environ, **mine}):
            dist.init_process_group("gloo")
    return World(int(mine["RANK"]), int(mine["WORLD_SIZE"]), int(mine["LOCAL_RANK"]), torch.device("cpu"))


@contextmanager
def _removed(scratch: Path, world: World, *, keep: bool) -> Iterator[None]:
    """An empty folder `scratch` inside; afterwards there is none, unless it is to be kept."""

    def remove() -> None:
        deadline = time.monotonic() + _LAST_WRITES
        while world.main and scratch.exists() and time.monotonic() < deadline:
            shutil.rmtree(scratch, ignore_errors=True)

    remove()
    together(lambda: files.make_folder(scratch) if world.main else None)
    try:
        yield
        barrier()
    finally:
        if not keep:
            remove()


@contextmanager
def _logs(keep: bool) -> Iterator[Path]:
    """A folder of this host for what the ranks print: a full disk must not lose it."""
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _visible(scratch: Path) -> None:
    if not files.is_folder(scratch):
        raise InputError(
            f"--out {scratch.parent}: this host does not see it; a folder that all hosts share would be right"
        )


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may be being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _events(run: RunFolder, event: str) -> list[dict[str, Any]]:
    return [line for line in _lines(run.events) if line["event"] == event]


def _losses(run: RunFolder) -> Losses:
    """Of each step that is logged, by steps completed."""
    return {line["step"]: line["loss"] for line in _lines(run.metrics) if line.get("loss") is not None}


def _evaluating_seconds(run: RunFolder) -> float:
    found = [line["time/evaluating"] for line in _lines(run.metrics) if "time/evaluating" in line]
    return float(found[-1]) if found else 0.0
