"""What is measured inside the ranks of a run that is built for this alone: memory, steps, the loader, storage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain import files
from pretrain.engine.guards import Guard
from pretrain.engine.quiet import get_accelerator
from pretrain.engine.step import deterministic
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.index.tar import BLOCK
from pretrain.plan.measured import memory_of
from pretrain.plan.memory.rank import rank_memory
from pretrain.plan.peak import device_name
from pretrain.ranks.collectives import World, all_gather_list, barrier
from pretrain.ranks.watchdog import Watchdog
from pretrain.record.folder import RunFolder
from pretrain.record.pulse import Pulse
from pretrain.rehearsal.devices import Meter, host_ranks
from pretrain.stream.counters import Counters
from pretrain.stream.loader import Batch, BatchStream
from pretrain.stream.plan import plan_evaluation, plan_training
from pretrain.stream.reader import Reader
from pretrain.training.config import RunConfig
from pretrain.training.experiment import build, parameters
from pretrain.training.setup import Setup, loader_options, open_loader, prepare
from pretrain.training.trainer import train
from pretrain.weights.fill import load_same

WORST_STEPS = 3  # on the largest images
_FEWEST, _MOST = 3, 50  # steps that are timed together
_PAIRS = 2  # times that live and cached are timed in turn
STEPS = 8  # that a run must have to be rehearsed


def measure(config: RunConfig, out: Path, world: World, seconds: float) -> None:
    """Build the run as it would be, measure it, and write each figure to `out` as soon as it is known. Collective.

    Args:
        out: a folder of this host; each rank writes a file there.
        seconds: about how long live and cached steps, the loader and storage are each measured.

    Raises:
        InputError: the run would be refused for the same reason.
    """
    known: dict[str, Any] = {}

    def note(**figures: Any) -> None:
        known.update(figures)
        files.write_text(figures_path(out, world.rank), json.dumps(known))

    meter = Meter(world.device)
    setup = prepare(config, None, RunFolder(out), world, ())
    if setup.recipe.steps < STEPS:
        raise InputError(
            f"{setup.recipe.steps} steps are too few to rehearse; train.steps={STEPS} or more would be right"
        )
    note(**_planned(setup, meter))
    # However long the run is to be, it is measured over as many steps as that takes.
    schedule = replace(setup.recipe.schedule, steps=max(setup.recipe.steps, 1_000_000))
    setup = replace(setup, recipe=replace(setup.recipe, schedule=schedule))
    engine, _ = build(setup, partial(parameters, setup, None, None, load_same))
    watchdog = Watchdog(out, world, hang=60 * config.train.hang_minutes, slow=60 * config.train.slow_minutes)
    with Pulse(watchdog, world.device) as pulse, deterministic(config.train.deterministic):
        bench = _Bench(setup, engine, pulse)
        worst, figures = largest_batch(setup)
        took = bench.steps(repeat(worst), WORST_STEPS)
        note(**figures, step_seconds=took / WORST_STEPS, peak_bytes=meter.peak())
        note(**_live_and_cached(setup, bench, worst, seconds), peak_bytes=meter.peak())
    note(**_loading(setup, seconds), **_reading(setup, seconds))
    barrier()


def figures_path(folder: Path, rank: int) -> Path:
    """Where a rank writes what it measured."""
    return folder / f"measured.{rank:05d}.json"


def _planned(setup: Setup, meter: Meter) -> dict[str, Any]:
    """What the run is, and the memory that is planned for each of its ranks."""
    recipe, config, device = setup.recipe, setup.config, setup.world.device
    job = config.job(recipe.layout, recipe.dtype, device="cpu" if device.type == "cpu" else "cuda", steps=recipe.steps)
    planned = rank_memory(job)
    kept = rank_memory(replace(job, checkpointing="none")).total if job.checkpointing != "none" else planned.total
    return {
        "plan": {**asdict(planned), "total": planned.total, "without_checkpointing": kept},
        "resting_bytes": meter.resting,  # before anything was built
        "device_bytes": memory_of(device),
        "host_ranks": host_ranks(),
        "device": device_name(device),
        "dtype": str(recipe.dtype).removeprefix("torch."),
        "workers": config.data.workers,
        "sample_bytes": setup.index.bytes / setup.index.samples,
    }


class _Bench:
    """The loop of a run, for some steps at a time, without what is written down of a run."""

    def __init__(self, setup: Setup, engine: Any, pulse: Pulse) -> None:
        self._setup, self._engine, self._pulse = setup, engine, pulse
        self._guard = Guard(setup.config.train.guard)

    def steps(self, batches: Iterator[Batch], count: int) -> float:
        """Train so many steps on `batches`; the seconds that they took, on the slowest rank. Collective."""
        barrier()
        get_accelerator().synchronize()
        began = time.perf_counter()
        train(
            self._engine,
            batches,
            self._setup.recipe,
            start=0,
            world=self._setup.world,
            pulse=self._pulse,
            ledger=_NoLedger(),  # type: ignore[arg-type]
            guard=self._guard,
            keeper=_Countdown(count),  # type: ignore[arg-type]
        )
        get_accelerator().synchronize()
        return max(all_gather_list([time.perf_counter() - began]))

    def waited(self) -> float:
        """Seconds that this rank waited for batches since the last call."""
        return self._pulse.window().waited


class _NoLedger:
    """In place of a run's ledger: writes nothing down."""

    faulty = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class _Countdown:
    """In place of a run's keeper: stops after so many steps."""

    def __init__(self, count: int) -> None:
        self._left = count

    def requests(self, done: int) -> tuple[bool, bool, bool]:
        return False, False, False

    def step(self, done: int, *requests: bool) -> bool:
        self._left -= 1
        return self._left > 0


def largest_batch(setup: Setup) -> tuple[Batch, dict[str, Any]]:
    """This rank's micro-batch of the data's largest images, and figures of it. Collective."""
    world, rows = setup.world, setup.recipe.layout.micro_batch
    ids, sizes = largest(setup.index, rows * world.size)
    ids = np.resize(ids, rows * world.size)  # a small set has too few: they come again
    options = replace(loader_options(setup), unreadable_chunks="mask")
    mixing = setup.config.data.mixing(setup.images.image_size, setup.config.seed)
    plans = plan_evaluation(ids, rows, world.rank, world.size)
    began = time.perf_counter()
    with BatchStream(setup.index, plans, setup.images, options, rows=rows, window=rows, mixing=mixing) as stream:
        batch = next(stream)
    return batch, {
        "largest_bytes": int(sizes.max()),
        "largest_seconds": time.perf_counter() - began,  # for the micro-batch
        "unreadable": [fault.describe(setup.index) for fault in batch.faults],
    }


def largest(index: Index, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids of the `count` samples (or all) that take most bytes of their shards, largest first, and these bytes."""
    ids, sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)
    before = 0
    for file in index.files:
        for shard in range(file.num_shards):
            first, end = int(file.first[shard]), int(file.first[shard + 1])
            starts = np.append(file.offsets[first:end].astype(np.int64), int(file.data_end[shard]) // BLOCK)
            sizes = np.concatenate([sizes, np.diff(starts) * BLOCK])
            ids = np.concatenate([ids, np.arange(before + first, before + end)])
            kept = np.argsort(-sizes, kind="stable")[:count]
            ids, sizes = ids[kept], sizes[kept]
        before += file.samples
    return ids, sizes


def _live_and_cached(setup: Setup, bench: _Bench, batch: Batch, seconds: float) -> dict[str, Any]:
    """Images/s of training on what the loader gives, and on one batch that is at hand, timed in turn."""
    each = bench.steps(repeat(batch), 1)
    count = max(_FEWEST, min(_MOST, math.ceil(seconds / (2 * _PAIRS) / each)))
    spent, waited = {"live": 0.0, "cached": 0.0}, 0.0
    with open_loader(setup, 0) as loader:
        # What was decoded while the others were timed must not count.
        drained = math.ceil(loader.ahead / setup.recipe.accumulation) + 1
        for _ in range(_PAIRS):
            bench.steps(loader, drained)
            bench.waited()
            spent["live"] += bench.steps(loader, count)
            waited += bench.waited()
            bench.steps(repeat(batch), 1)
            spent["cached"] += bench.steps(repeat(batch), count)
    images = _PAIRS * count * setup.recipe.layout.global_batch
    return {
        "live_images_per_second": images / spent["live"],
        "cached_images_per_second": images / spent["cached"],
        "data_wait": waited / spent["live"],
        "step_seconds": spent["cached"] / (_PAIRS * count),
    }


def _loading(setup: Setup, seconds: float) -> dict[str, float]:
    """Images/s of this rank's loader while nothing is trained."""
    with open_loader(setup, setup.recipe.steps // 2) as loader:
        for _ in range(loader.ahead):
            next(loader, None)
        barrier()
        began, images = time.perf_counter(), 0
        for batch in loader:
            images += len(batch.ids)
            if time.perf_counter() - began > seconds / 2:
                break
        return {"loader_images_per_second": images / (time.perf_counter() - began)}


def _reading(setup: Setup, seconds: float) -> dict[str, float]:
    """Bytes/s and requests/s that storage gives this rank while all of them read and none decodes."""
    world, order, layout, options = setup.world, setup.order, setup.recipe.layout, loader_options(setup)
    # Of another half of the run than what was loaded: it is not in the host's memory yet.
    start = setup.recipe.steps // 4
    plans = plan_training(order, layout.micro_batch, world.rank, world.size, start, setup.recipe.steps, setup.trained)
    counters, window = Counters(), -(-3 * order.lane_count * order.chunk // (2 * world.size))
    reader = Reader(setup.index, plans, window, options.read_ahead, counters, options.timeouts)
    barrier()
    began, images, requests = time.perf_counter(), 0, 0
    try:
        for plan in reader:
            requests += sum(len(setup.index.extents(chunk.ids)) for chunk in plan.fresh)
            for chunk, sample in zip(plan.chunks, plan.ids.tolist(), strict=True):
                if chunk is not None:
                    chunk.take(sample)
                    images += 1
            if time.perf_counter() - began > seconds / 2:
                break
    finally:
        reader.close()
    spent = time.perf_counter() - began
    return {
        "read_bytes_per_second": counters.bytes_read / spent,
        "requests_per_second": requests / spent,
        "requests_per_image": requests / max(images, 1),
    }
