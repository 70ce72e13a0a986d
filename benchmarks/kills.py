"""SIGKILL at random over the life of a run: what it must not change, compared with a run that nobody disturbed.

    python benchmarks/kills.py [--kills 90] [--commands 10] [--changes 10] [--seed 0]

One run of two ranks is killed and started again until it is finished: ranks forked from a warm parent, and among them
real `deepspeed` commands. A kill hits one rank, the others following, or all: while the run starts, some steps later,
or while a checkpoint is being written. Then another run changes its number of ranks (1 to 3), its ZeRO stage (0 to 3)
and its micro-batch at every turn, and is killed twice in each; the 20 steps after a change are compared with what the
run would have done without that change, from the same checkpoint.

After every kill all checkpoints must read and verify, and the next start must go on from the newest. In the same world
every loss that was ever logged is compared with the undisturbed run's; in both, every step's sample ids with the order
of the stream. Status 1 if anything is not as it must be. Figures: runs/bench/kills.json.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import itertools
import json
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.started import Command, Forked, Started
from benchmarks.table import print_table, save
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.step import Checkpoint
from pretrain.datasets.sources import open_source
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.shards.write import write_shards
from pretrain.stream.order import Order

BATCH, EVERY, AFTER = 12, 4, 20  # AFTER: steps on a changed layout
CLOSE = 1e-5
PATIENCE = 240.0  # seconds for a run to get where it is wanted


@dataclass
class Tally:
    """What was done and what was found."""

    kills: Counter[str] = field(default_factory=Counter)
    saves_hit: int = 0  # kills that left a half-written checkpoint behind
    checkpoints: int = 0  # read and verified after a kill
    resumed: int = 0  # starts seen to go on from the newest checkpoint
    losses: int = 0
    equal: int = 0  # bit for bit
    worst: float = 0.0
    steps: int = 0  # whose ids were compared
    wrong_ids: int = 0
    faults: list[str] = field(default_factory=list)

    def claim(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(what)
            print(f"NOT AS IT MUST BE: {what}", flush=True)


class Life:
    """A run folder, from its first start to its last; `start(…)` starts or resumes it."""

    def __init__(self, folder: Path, tally: Tally, draw: random.Random) -> None:
        self.out, self._logs, self._tally, self._draw = folder / "run", folder, tally, draw
        self._starts = itertools.count()
        self._newest = 0  # step of the newest checkpoint when the run was last killed
        folder.mkdir()

    def start(self, how: Callable[..., Any], world: int, *words: object) -> Started:
        log = self._logs / f"start_{next(self._starts):03d}.txt"
        started: Started = how(world, [*words, "--out", self.out], log)
        return started

    def kill(self, started: Started, label: str, reached: Callable[[Started], bool], delay: float) -> bool:
        """Kill it `delay` seconds after it has got there; False where it was over before."""
        deadline = time.monotonic() + PATIENCE
        while not reached(started):
            if not started.running or time.monotonic() > deadline:
                return self._over(started)
            time.sleep(0.001)
        time.sleep(delay)
        if not started.running:
            return self._over(started)
        ranks = started.pids
        if len(ranks) > 1 and self._draw.random() < 0.5:
            started.send(signal.SIGKILL, self._draw.randrange(len(ranks)))
            time.sleep(self._draw.uniform(0, 0.3))  # the others notice, or not yet
        started.kill()
        self._tally.kills[label] += 1
        self._examine(started)
        return True

    def branch(self, world: int, *words: object) -> list[dict[str, Any]]:
        """What a copy of this run would log, were it to go on so."""
        copy = Life(self._logs / f"branch_{next(self._starts):03d}", self._tally, self._draw)
        shutil.copytree(self.out, copy.out)
        copy._newest = self._newest
        copy.finish(copy.start(Forked, world, *words))
        return lines(copy.out / "metrics.jsonl")

    def finish(self, started: Started) -> None:
        statuses = started.wait(600)
        if None in statuses:
            started.kill()
        self._tally.claim(set(statuses) == {0}, f"ended with {statuses}: {started.said[-2000:]}")
        self._resumption(started)
        self._newest = self.newest

    @property
    def newest(self) -> int:
        found = checkpoints.list_checkpoints(self.out / "checkpoints")
        return int(found[0].name.removeprefix("step_")) if found else 0

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.out / "checkpoints").glob("partial_*"))

    def _over(self, started: Started) -> bool:
        self.finish(started)
        return False

    def _examine(self, started: Started) -> None:
        """All that was whole is whole still, and the newest is the last that was said to be saved, or a later one."""
        folder, tally = self.out / "checkpoints", self._tally
        self._resumption(started)
        tally.saves_hit += self.saving
        for path in checkpoints.list_checkpoints(folder):
            try:
                Checkpoint.read(path).verify()
                tally.checkpoints += 1
            except InputError as error:
                tally.claim(False, str(error))
        told = max((int(step) for step in re.findall(r"saved \S+step_(\d+)", started.said)), default=0)
        tally.claim(self.newest >= max(told, self._newest), f"step {told} was saved, {self.newest} is the newest")
        latest = folder / checkpoints.LATEST
        tally.claim(not latest.exists() or (folder / latest.read_text()).is_dir(), "latest names no checkpoint")
        logged = [line["step"] for line in lines(self.out / "metrics.jsonl")]
        tally.claim(set(range(1, self.newest + 1)) <= set(logged), f"metrics lack steps before {self.newest}")
        self._newest = self.newest

    def _resumption(self, started: Started) -> None:
        """It went on from the newest checkpoint of when it was last killed, if it came so far as to say."""
        if found := re.search(r"steps ([\d,]+) to ", started.said):
            step = int(found[1].replace(",", ""))
            self._tally.claim(step == self._newest, f"went on from {step}, {self._newest} was the newest checkpoint")
            self._tally.claim("passed over" not in started.said, f"passed a checkpoint over: {started.said}")
            self._tally.resumed += step > 0

    def compare(self, expected: dict[int, float], logged: Iterable[dict[str, Any]], *, within: float = 0.0) -> None:
        """Logged losses with those of a run that did not suffer what this one did."""
        tally = self._tally
        for line in logged:
            apart = abs(line["loss"] - expected[line["step"]])
            tally.losses, tally.equal = tally.losses + 1, tally.equal + (apart == 0)
            tally.worst = max(tally.worst, apart)
            tally.claim(apart <= within, f"step {line['step']}: the loss is {apart:.1e} off")

    def close(self, order: Order, steps: int) -> None:
        """The files of the finished run tell one history, of the order's samples."""
        tally, trained = self._tally, dict[int, list[int]]()
        logged = [line["step"] for line in lines(self.out / "metrics.jsonl")]
        tally.claim(logged == list(range(1, steps + 1)), f"metrics.jsonl tells of steps {logged}")
        for path in sorted((self.out / "audit").glob("rank_?????.jsonl")):
            for line in lines(path):
                trained.setdefault(line["step"], []).extend(line["ids"])
        wrong = [step for step in range(steps) if trained.get(step) != order.ids(step).tolist()]
        tally.steps, tally.wrong_ids = tally.steps + steps, tally.wrong_ids + len(wrong)
        tally.claim(not wrong, f"other samples at steps {wrong[:10]}")


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a JSONL file, the whole ones."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def after(steps: int) -> Callable[[Started], bool]:
    """Whether a start has made so many steps of its own."""
    return lambda started: started.said.count("\nstep ") >= steps


def same_world(life: Life, config: Path, aims: list[str], draw: random.Random) -> int:
    """Kill it once for each of `aims` ("fork …" or "command …"), and let it finish. How many kills were left over."""
    words = ("--config", config)
    while aims:
        kind, _, moment = aims[-1].partition(", ")
        started = life.start(Command if kind == "command" else Forked, 2, *words)
        steps, pause = after(draw.randint(1, 12)), draw.uniform(0, 0.05)
        if moment == "starting":
            done = life.kill(started, aims[-1], after(0), pause * (160 if kind == "command" else 20))
        elif moment == "saving":
            done = life.kill(started, aims[-1], lambda run, steps=steps: steps(run) and life.saving, pause)
        else:
            done = life.kill(started, aims[-1], steps, pause)
        if not done:
            return len(aims)  # it got to its end
        aims.pop()
    life.finish(life.start(Forked, 2, *words))
    return 0


def changing_world(life: Life, config: Path, changes: int, draw: random.Random) -> list[str]:
    """Go on on other ranks and another stage after each AFTER steps, killed once amid them and once at their end."""
    layouts, now = ["2 × ZeRO 1"], (2, 1)
    words: list[object] = ["--config", config]
    life.kill(life.start(Forked, 2, *words), "fork, before", lambda run: life.newest >= AFTER, draw.uniform(0, 0.05))
    unchanged: list[list[dict[str, Any]]] = []
    for _ in range(changes):
        step, until = life.newest, life.newest + AFTER
        unchanged.append(life.branch(now[0], *words, "--extend", f"train.steps={until}")[step:])
        now = draw.choice([(w, s) for w, s in itertools.product((1, 2, 3), range(4)) if (w, s) != now])
        micro = draw.choice([n for n in range(2, BATCH // now[0] + 1) if BATCH // now[0] % n == 0])
        layouts.append(f"{now[0]} × ZeRO {now[1]}, micro-batch {micro}")
        words = ["--config", config, f"deepspeed.zero_optimization.stage={now[1]}", f"train.micro_batch={micro}"]
        for reached in (after(draw.randint(1, AFTER - EVERY)), lambda run, until=until: life.newest >= until):
            life.kill(life.start(Forked, now[0], *words), "fork, changed", reached, draw.uniform(0, 0.05))
    life.finish(life.start(Forked, now[0], *words))
    logged = {line["step"]: line for line in lines(life.out / "metrics.jsonl")}
    for branch in unchanged:
        expected = {line["step"]: line["loss"] for line in branch}
        life.compare(expected, (logged[step] for step in expected), within=CLOSE)
    return layouts


def write_config(path: Path, shards: Path, steps: int, *, dropout: float) -> Path:
    """A network just large enough that to write it takes longer than a step."""
    tree = {
        "name": "kills",
        "model": {
            "patch_size": 4, "layers": 2, "width": 64, "mlp": 256, "heads": 2, "dropout": dropout,
            "image_size": 16, "channels": 1, "num_classes": 10,
        },
        "data": {"train": str(shards), "workers": 1, "audit": True},
        "train": {"global_batch": BATCH, "steps": steps},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "averaging": {"decay": 0.99}},
        "schedule": {"warmup_steps": 5, "decay": "constant"},
        "checkpoint": {"every": EVERY},
        "logging": {"every": 1, "tensorboard": False, "peak_tflops": 1},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }  # fmt: skip
    path.write_text(json.dumps(tree))
    return path


def undisturbed(folder: Path, config: Path, tally: Tally) -> dict[int, float]:
    run = Forked(2, ["--config", config, "--out", folder], folder.with_suffix(".txt"))
    tally.claim(run.wait(600) == [0, 0], f"the undisturbed run failed: {run.said[-2000:]}")
    return {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=90, help="of ranks forked from a warm parent")
    parser.add_argument("--commands", type=int, default=10, help="kills of real deepspeed commands")
    parser.add_argument("--changes", type=int, default=10, help="of world size, ZeRO stage and micro-batch")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, began, wanted = random.Random(args.seed), time.monotonic(), args.kills + args.commands
    same, changed = Tally(), Tally()
    layouts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kills_") as name:
        here = Path(name)
        write_shards(open_source("digits", "train", None), here / "shards")
        order = Order(Index.open(here / "shards").samples, BATCH, seed=0)

        moments = ("saving", "saving", "training", "training", "starting")
        aims = [f"{kind}, {moments[n % 5]}" for kind, n in _each(fork=args.kills, command=args.commands)]
        draw.shuffle(aims)
        steps = max(40, 8 * wanted)
        config = write_config(here / "same.json", here / "shards", steps, dropout=0.1)
        losses = undisturbed(here / "same_undisturbed", config, same)
        for number in itertools.count():
            life = Life(here / f"same_{number}", same, draw)
            left = same_world(life, config, aims, draw)
            life.compare(losses, (*lines(life.out / "metrics.jsonl"), *lines(life.out / "metrics.discarded.jsonl")))
            life.close(order, steps)
            _progress(same, began)
            if not left or same.faults:
                break

        if args.changes:
            steps = (args.changes + 1) * 2 * AFTER
            config = write_config(here / "changed.json", here / "shards", steps, dropout=0.0)
            life = Life(here / "changed", changed, draw)
            layouts = changing_world(life, config, args.changes, draw)
            life.close(order, steps)
    seconds = time.monotonic() - began
    report(same, changed, layouts, seconds)
    return 1 if same.faults or changed.faults else 0


def _each(**counts: int) -> list[tuple[str, int]]:
    return [(kind, n) for kind, count in counts.items() for n in range(count)]


def _progress(tally: Tally, began: float) -> None:
    print(f"{tally.kills.total()} kills, {time.monotonic() - began:.0f} s", flush=True)


def report(same: Tally, changed: Tally, layouts: list[str], seconds: float) -> None:
    rows = [
        ("kills", *(f"{t.kills.total()}" for t in (same, changed))),
        ("… that left a half-written checkpoint", *(f"{t.saves_hit}" for t in (same, changed))),
        ("… of real commands", *(f"{sum(n for k, n in t.kills.items() if 'command' in k)}" for t in (same, changed))),
        ("changes of ranks, stage, micro-batch", "0", f"{max(len(layouts) - 1, 0)}"),
        ("resumed from the newest checkpoint", *(f"{t.resumed}" for t in (same, changed))),
        ("checkpoints verified after kills", *(f"{t.checkpoints}" for t in (same, changed))),
        ("losses compared", *(f"{t.losses:,}" for t in (same, changed))),
        ("… equal to the bit", *(f"{t.equal:,}" for t in (same, changed))),
        ("largest difference of a loss", *(f"{t.worst:.1e}" for t in (same, changed))),
        ("steps whose ids were compared", *(f"{t.steps:,}" for t in (same, changed))),
        ("… that differ", *(f"{t.wrong_ids}" for t in (same, changed))),
        ("faults", *(f"{len(t.faults)}" for t in (same, changed))),
    ]
    print_table(f"killed and started again, {seconds:.0f} s", ("", "same ranks", "changing ranks"), rows)
    named = {"same": same, "changed": changed}
    save("kills", {"seconds": seconds, "layouts": layouts, **{key: vars(tally) for key, tally in named.items()}})


if __name__ == "__main__":
    sys.exit(main())
