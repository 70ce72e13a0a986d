"""The whole loop against the bare step on the same images, and a live loader against one cached batch.

    python benchmarks/loop.py [--arch vit_ti_16] [--batch 16] [--ranks 1,2] [--rounds 9] [--block 4] [--workers 2]

One run of the trainer, as launch/pretrain.py starts it (stream, engine, meters, books, keeper), is given its batches
in turns: a block of steps with what its loader decodes meanwhile, a block with one batch again and again, and between
them a block of bare steps in the same process: forward, backward, clipping, fused AdamW of a second network, with
DistributedDataParallel on several ranks, on images at hand. The three change places from round to round. The first
steps of a live block are not timed: their batches were decoded while nothing was trained. Photographs of 500×375, JPEG.

A loader in the trainer's process may hold up the thread that launches kernels. No wait for data shows that; live
against cached does. On a GPU (DS_ACCELERATOR=cuda) the command is the same. Tables, plots and JSON in runs/bench/.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import ranks
from benchmarks.photos import CLASSES, write_photos
from benchmarks.products import Products
from benchmarks.strips import save_strips
from benchmarks.table import OUT, print_table, save, spread
from pretrain.engine import processgroup
from pretrain.engine.optimizer import build_optimizer
from pretrain.images.transforms import to_float
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer
from pretrain.ranks import collectives
from pretrain.ranks.collectives import World
from pretrain.stream.counters import Counters
from pretrain.stream.loader import Batch, TrainLoader
from pretrain.training import experiment
from pretrain.training.config import RunConfig
from pretrain.training.setup import Setup, open_loader

LIVE, CACHED, BARE = "loop, live", "loop, cached", "bare step"
WARM = 5  # steps of a live block that are not timed, more than the loader decodes ahead; one of the others


@dataclass
class Measured:
    """Of each round: seconds a step, and the FLOP/s of bare matrix products just before, by way."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {BARE: [], LIVE: [], CACHED: []})
    rates: dict[str, list[float]] = field(default_factory=lambda: {BARE: [], LIVE: [], CACHED: []})

    def ratios(self, way: str, other: str) -> list[float]:
        """How many times as fast as `other` a way is, round by round."""
        return [slow / quick for slow, quick in zip(self.seconds[other], self.seconds[way], strict=True)]


def main() -> None:
    args = parse()
    if ranks.is_rank():
        del sys.argv[-2:]  # --photos: the command is shown as it was typed
        measure(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder) / "photos", args.images)
        sys.exit(max(ranks.launch(count, "--photos", str(photos.shards)) for count in args.ranks))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_ti_16")
    parser.add_argument("--batch", type=int, default=16, help="images a rank and step")
    parser.add_argument("--ranks", type=lambda text: [int(one) for one in text.split(",")], default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=4, help="timed steps of a block")
    parser.add_argument("--workers", type=int, default=2, help="decode threads a rank")
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO")
    parser.add_argument("--images", type=int, default=512, help="of the data set")
    parser.add_argument("--photos", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    """As one rank: run and report."""
    world = processgroup.start()
    config = RunConfig.model_validate(
        {
            "name": "loop",
            "model": {"arch": args.arch, "num_classes": CLASSES},
            "data": {"train": args.photos, "workers": args.workers},
            "train": {"global_batch": args.batch * world.size, "steps": steps(args.rounds, args.block)},
            "optimizer": {"lr": 1e-4, "weight_decay": 0.1},
            "schedule": {"warmup_steps": 0},
            "logging": {"every": 1, "tensorboard": False},
            "checkpoint": {"every": 1_000_000, "every_minutes": None},
            "deepspeed": {"zero_optimization": {"stage": args.stage}, "bf16": {"enabled": "auto"}},
        }
    )
    found = compare(config, OUT / f"loop_{world.size}", world, rounds=args.rounds, block=args.block)
    if world.main:
        report(args, world, found)
    processgroup.stop()


def steps(rounds: int, block: int) -> int:
    """Of the run: a live and a cached block a round, a round that warms up, and one that ends the last block."""
    return (rounds + 1) * (WARM + block + 1 + block) + 1


def compare(config: RunConfig, out: Path, world: World, *, rounds: int, block: int) -> Measured:
    """Train a config of `steps(rounds, block)` steps in `out`, its batches in turns; the times. Collective."""
    collectives.on_main(lambda: shutil.rmtree(out, ignore_errors=True))
    found = Measured()

    @contextmanager
    def opened(setup: Setup, start: int) -> Iterator[Turns]:
        with open_loader(setup, start) as loader:
            yield Turns(setup, loader, found, rounds, block)

    with mock.patch.object(experiment, "open_loader", opened):
        experiment.run(config, out, world)
    for times in (found.seconds, found.rates):
        for values in times.values():
            del values[0]  # of the round that warms up
    return found


class Turns:
    """In place of a run's loader: its batches, and others, with the time of each block taken."""

    def __init__(self, setup: Setup, loader: TrainLoader, found: Measured, rounds: int, block: int) -> None:
        assert setup.recipe.accumulation == 1
        assert loader.ahead < WARM
        self._setup, self._loader, self._found, self._rounds, self._block = setup, loader, found, rounds, block
        spec, layout = setup.config.model.spec(), setup.recipe.layout
        self._products = Products(spec, layout.micro_batch, setup.world.device, setup.recipe.dtype)
        self._bare = bare_step(setup)
        self._kept: list[Batch] = []

    @property
    def counters(self) -> Counters:
        """The loader's."""
        return self._loader.counters

    def __iter__(self) -> Iterator[Batch]:
        ways: list[Callable[[], Iterator[Batch]]] = [self._bare_steps, self._live, self._cached]
        self._kept = [_held(batch, self._setup) for batch in islice(self._loader, self._block)]
        for number in range(self._rounds + 1):
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                yield from way()
        yield self._kept[0]  # once it is asked for, the last block is over

    def _live(self) -> Iterator[Batch]:
        yield from islice(self._loader, WARM)
        yield from self._timed(LIVE, self._loader)

    def _cached(self) -> Iterator[Batch]:
        yield self._kept[0]
        yield from self._timed(CACHED, repeat(self._kept[0]))

    def _bare_steps(self) -> Iterator[Batch]:
        self._bare(self._kept[0])
        for batch in self._timed(BARE, iter(self._kept)):
            self._bare(batch)
        yield from ()

    def _timed(self, way: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        """A block: from before its first batch until the one after its last is asked for."""
        self._found.rates[way].append(self._products.rate())
        began = self._now()
        yield from islice(batches, self._block)
        self._found.seconds[way].append((self._now() - began) / self._block)

    def _now(self) -> float:
        if self._setup.world.device.type != "cpu":
            torch.get_device_module(self._setup.world.device).synchronize()
        collectives.barrier()
        return time.perf_counter()


def _held(batch: Batch, setup: Setup) -> Batch:
    """A copy on the device: what the loader gave goes back to it."""
    return replace(batch.to(setup.world.device), images=batch.images.clone().to(setup.world.device))


def bare_step(setup: Setup) -> Callable[[Batch], None]:
    """A step as one writes it by hand, of a network of its own."""
    config, recipe, world = setup.config, setup.recipe, setup.world
    model = VisionTransformer(config.model.spec(), compiled=config.train.compile)
    initialize(model, config.seed)
    model.to(world.device, recipe.dtype)
    optimizer = build_optimizer(model, config.optimizer)
    network: nn.Module = DistributedDataParallel(model) if world.size > 1 else model

    def step(batch: Batch) -> None:
        images: Tensor = to_float(batch.images, recipe.dtype)
        recipe.loss(network(images), batch.labels, batch.valid, batch.weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def report(args: argparse.Namespace, world: World, found: Measured) -> None:
    """The table, the plot and the JSON."""
    title = f"{args.arch}, {world.device.type}, {world.size} ranks × {args.batch} images, ZeRO {args.stage}"
    rows = []
    for way, seconds in found.seconds.items():
        gigas = [rate / 1e9 for rate in found.rates[way]]
        rows.append((way, *spread(seconds, ".3f"), *spread(found.ratios(way, BARE), ".3f"), *spread(gigas)))
    header = ("", "s a step", "low – high", "× bare", "low – high", "mm GFLOP/s", "low – high")
    print_table(title, header, rows)
    live = found.ratios(LIVE, CACHED)
    print(f"live is {' × cached (median of rounds), '.join(spread(live, '.3f'))}")
    name = f"loop_{args.arch}_{world.device.type}_{world.size}"
    ratios = {f"{way} ÷ {BARE}": statistics.median(found.ratios(way, BARE)) for way in (LIVE, CACHED)}
    ratios["live ÷ cached"] = statistics.median(live)
    save(name, {"arguments": vars(args), "ranks": world.size, "rates": ratios, "measured": vars(found)})
    save_strips(name, title, {"seconds a step": found.seconds})


if __name__ == "__main__":
    main()
