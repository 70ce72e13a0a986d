"""The protocol of the paper's Table 4: the learning rate that scores best on held-out samples, then runs on them all.

Every run is an ordinary run folder, `sweep/lr_…` or `full/seed_…`. What is done is told by these folders, which a
restart goes through again: a finished run has nothing to do, one under way resumes. `sweep.json` is made from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from finetune.config import FinetuneConfig
from finetune.sweeppage import draw_sweep, sweep_text
from pretrain import files
from pretrain.configfile import differences
from pretrain.console import say
from pretrain.engine.engine import free_memory
from pretrain.errors import DivergedError, InputError, StorageError
from pretrain.index.index import Index
from pretrain.ranks.collectives import World, any_rank, is_main, on_main, together
from pretrain.ranks.command import DONE, STOPPED
from pretrain.ranks.stop import Stop
from pretrain.record.claim import claimed
from pretrain.record.folder import CONFIG, RunFolder
from pretrain.training.origin import Init, Origin, check_began
from pretrain.training.resume import completed, rule_of

RECORD, PLOT = "sweep.json", "sweep.png"


def check_folder(out: Path, *, sweep: bool) -> None:
    """Refuse a sweep in the folder of one run, and one run in a sweep's folder. Collective.

    Raises:
        InputError: `out` holds the other of the two.
    """
    if sweep and on_main(lambda: files.exists(out / CONFIG)):
        raise InputError(f"--sweep: {out} holds a single run; give another --out, or leave --sweep out to resume it")
    if not sweep and on_main(lambda: files.exists(out / RECORD)):
        raise InputError(f"{out}: holds a sweep; give --sweep to resume it, or another --out")


class Sweep:
    """The runs of one sweep, one after the other on the ranks at hand."""

    def __init__(
        self, task: FinetuneConfig, out: Path, world: World, train: Callable[..., int], *, init: Init | None
    ) -> None:
        """Collective.

        Args:
            train: `experiment.run`, given all but a config, its folder, and `check` or `stop`.

        Raises:
            InputError: the config does not say what to sweep, or the folder holds a sweep of another config, other data
                or weights.
        """
        if task.sweep is None:
            example = json.dumps(FinetuneConfig.model_fields["sweep"].examples[0])  # type: ignore[index]
            raise InputError(f"--sweep: config {task.name} has no section sweep; as in sweep={example}")
        if task.data.held_out:
            raise InputError(
                f"data.held_out: {task.data.held_out:g}, but with --sweep the last runs train on all samples; 0 would "
                "be right, and sweep.held_out is the share of the runs that choose"
            )
        metric, raw = task.sweep.metric, task.sweep.metric.removeprefix("averaged/")
        if metric != raw and task.optimizer.averaging is None:
            raise InputError(
                f'sweep.metric: "{metric}", but optimizer.averaging is null, and no average is kept; "{raw}" would be '
                "right"
            )
        self._task, self._section, self._out, self._world, self._train = task, task.sweep, out, world, train
        self._path, self._init = out / RECORD, init
        self._now: dict[str, Any] = {
            "config": task.model_dump(mode="json"),
            "train": _index_hash(task.data.train),
            "eval": _index_hash(task.data.eval),
        }
        before = on_main(self._read)
        if before:
            self._check(before)
        self._record = self._new_record(before)
        self._begun = on_main(lambda: any((out / "full").glob("seed_*/checkpoints/step_*")))

    def check(self) -> int:
        """Say what the runs would be; the exit status. Writes nothing. Collective."""
        for trial in self._record["trials"]:
            if "diverged" not in trial:
                self._train(self._of_rate(trial["lr"]), self._out / trial["folder"], check=True)
        rate = self._record["chosen"] or self._task.optimizer.lr
        for full in self._record["full"]:
            self._train(self._of_seed(full["seed"], rate), self._out / full["folder"], check=True)
        return DONE

    def run(self) -> int:
        """Train all that is not finished, and say what came of it; the exit status. Collective.

        Raises:
            InputError: as a run does.
            DivergedError: no rate gave a run to its end, or a run with the chosen one did not come to its.
        """
        together(lambda: files.make_folder(self._out))
        with claimed(self._out, self._world):
            if not self._begun:
                self._check_last_run()
            self._write()
            stop = Stop(self._out, self._world, self._task.train.time_limit_minutes)
            try:
                finished = self._choose(stop) and self._finish(stop)
            except StorageError as error:
                if not any("scores" in run for run in self._record["trials"]):
                    raise
                self._say(f"stopped: {error}; once that has passed, run the same command again to resume")
                finished = False
            stop.done()
            if not finished:
                return STOPPED
            self._write(plot=True)
            self._say(sweep_text(self._record))
            self._say(f"sweep: {self._path}")  # last: launch/ssh.sh takes it for the end
            return DONE

    def _choose(self, stop: Stop) -> bool:
        """Train with every rate and choose one; False where a stop was asked for. Collective."""
        record, metric = self._record, self._section.metric
        for trial in record["trials"]:
            if "diverged" in trial:
                self._say(f"{self._out / trial['folder']}: diverged: {trial['diverged']}")
                continue
            try:
                if not self._one(self._of_rate(trial["lr"]), trial, stop):
                    return False
            except DivergedError as error:
                trial["diverged"] = str(error)
                self._say(f"learning rate {trial['lr']:g} is lost: {error}")
            free_memory()
            self._write()
        scored = [trial for trial in record["trials"] if "scores" in trial]
        if not scored:
            raise DivergedError(f"{self._out}: every rate of sweep.lrs diverged; smaller ones would be right")
        best = max(scored, key=lambda trial: (trial["scores"][metric], -trial["lr"]))
        if self._begun and record["chosen"] not in (None, best["lr"]):
            raise InputError(
                f"{self._out / 'full'}: holds runs with the learning rate {record['chosen']:g}, and of sweep.lrs "
                f"{best['lr']:g} is the best by {metric} now; remove the folder, or give another --out"
            )
        record["chosen"] = best["lr"]
        self._write()
        return True

    def _finish(self, stop: Stop) -> bool:
        """Train on all samples with the chosen rate, once a seed; False where a stop was asked for. Collective."""
        for full in self._record["full"]:
            if not self._one(self._of_seed(full["seed"], self._record["chosen"]), full, stop):
                return False
            free_memory()
            self._write()
        return True

    def _one(self, config: FinetuneConfig, entry: dict[str, Any], stop: Stop) -> bool:
        """Train one run to its end and note its scores; False where a stop was asked for. Collective."""
        if any(any_rank(self._world.device, stop.asked())):
            self._say(f"stopped: {stop.reason}; run the same command again to resume")
            return False
        folder = self._out / entry["folder"]
        self._check_weights(self._record["origin"])  # they may be a run's newest, which has moved on meanwhile
        if self._train(config, folder, stop=stop) == STOPPED:
            return False
        entry["scores"] = on_main(RunFolder(folder).last_scores)
        return True

    def _check_last_run(self) -> None:
        """Refuse what would end the runs on all samples, before the others have taken their time. Collective."""
        self._say("once the learning rate is chosen:")
        full = self._record["full"][0]
        self._train(self._of_seed(full["seed"], self._task.optimizer.lr), self._out / full["folder"], check=True)

    def _of_rate(self, rate: float) -> FinetuneConfig:
        """The run that scores a rate on held-out samples."""
        task = self._task
        data = task.data.model_copy(update={"held_out": self._section.held_out, "eval": None})
        return _with_rate(task, rate).model_copy(update={"name": f"{task.name}-lr_{rate}", "data": data})

    def _of_seed(self, seed: int, rate: float) -> FinetuneConfig:
        """A run on all samples."""
        task = self._task
        return _with_rate(task, rate).model_copy(update={"name": f"{task.name}-seed_{seed}", "seed": seed})

    def _new_record(self, before: dict[str, Any]) -> dict[str, Any]:
        section = self._section
        lost = {trial["lr"]: trial["diverged"] for trial in before.get("trials", []) if "diverged" in trial}
        seeds = section.seeds or (self._task.seed,)
        return {
            **self._now,
            "origin": before.get("origin"),
            "metric": section.metric,
            "held_out": section.held_out,
            "trials": [
                {"lr": rate, "folder": f"sweep/lr_{rate}", **({"diverged": lost[rate]} if rate in lost else {})}
                for rate in section.lrs
            ],
            "chosen": before.get("chosen"),
            "full": [{"seed": seed, "folder": f"full/seed_{seed}"} for seed in seeds],
        }

    def _check(self, before: dict[str, Any]) -> None:
        """Refuse to go on with a sweep of another config, other data or other weights. Collective."""
        now = self._now["config"]
        changed = [
            f"{key} was {json.dumps(was)}, is {json.dumps(will)}"
            for key, was, will in differences(completed(before["config"], FinetuneConfig, now), now)
            if rule_of(key, FinetuneConfig) != "free" and key != "data.eval"
        ]
        for name in ("train", "eval"):
            if before[name] != self._now[name]:
                was, will = (f"{found[name]:.12}…" if found[name] else "none" for found in (before, self._now))
                changed.append(f"data.{name}: its index's hash was {was}, is {will}")
        if changed:
            raise InputError(
                f"{self._path}: the sweep was of another config: {'; '.join(changed)}. Restore these to resume, or "
                "give another --out to start anew"
            )
        self._check_weights(before["origin"])

    def _check_weights(self, origin: Origin | None) -> None:
        """Refuse weights that the runs so far, of this `origin`, did not begin from. Collective."""
        began = on_main(lambda: origin)  # which the others have not read
        if self._init is not None and began is not None:
            try:
                check_began(began, self._init, self._out)
            except InputError as error:
                again = f"all runs of a sweep begin from the same weights: --init {began['source']} would be right"
                raise type(error)(f"{error}; {again}") from None

    def _read(self) -> dict[str, Any]:
        """The record of a sweep that has begun, else an empty one: before its first run anything may change."""
        if not files.exists(self._path) or not any(self._out.glob(f"sweep/*/{CONFIG}")):
            return {}
        try:
            found: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{self._path}: cannot be read: {error}; remove it, or give another --out") from None
        return found

    def _write(self, *, plot: bool = False) -> None:
        """Write down what is known. Collective."""
        record = self._record
        scores = [full["scores"] for full in record["full"] if "scores" in full]
        names = [name for name in scores[0] if all(one.get(name) is not None for one in scores)] if scores else []
        record["mean"] = {name: mean(one[name] for one in scores) for name in names}
        record["std"] = {name: stdev(one[name] for one in scores) for name in names} if len(scores) > 1 else {}

        def write() -> None:
            if self._world.main:
                record["origin"] = record["origin"] or next(map(_origin, self._out.glob(f"sweep/*/{CONFIG}")), None)
                files.write_text(self._path, json.dumps(record, indent=2) + "\n")
                if plot:
                    with files.atomic_write(self._out / PLOT) as file:
                        file.write(draw_sweep(record))

        together(write)

    def _say(self, text: str) -> None:
        if is_main():
            say(text)


def _with_rate(task: FinetuneConfig, rate: float) -> FinetuneConfig:
    return task.model_copy(update={"optimizer": task.optimizer.model_copy(update={"lr": rate})})


def _index_hash(paths: Any) -> str | None:
    """The hash of the index that a config key names; None where it is not set. Collective."""
    return None if paths is None else on_main(lambda: Index.open(paths).hash)


def _origin(config: Path) -> Any:
    """What the run began from whose record this is."""
    return json.loads(config.read_text(encoding="utf-8"))["origin"]
