"""What a run of any length pays for its place in the data: resume, order, memory, bytes read; and shuffle quality.

    python benchmarks/stream.py [--repeats 25] [--quick]

Index: a fresh process opens one of 3·10⁸ samples, and hashes it. Resume: from nothing open to the first batch, at 1 %,
50 % and 99 % of an epoch, in turns; of a set on disk, and by one of 64 ranks of a run over 3·10⁸ samples
(benchmarks/vast.py). Kills: benchmarks/elastic.py. Memory: the most anonymous memory of a process that passes over a
set, and over ten times the set. Reading: bytes asked of the kernel (rchar) over two epochs by 1, 2 and 8 ranks, divided
by the bytes that the samples take in the shards. Shuffle: benchmarks/shuffle.py.
Images are 64 px JPEGs, but 500×375 where bytes are counted. Linux only. Figures: runs/bench/stream.json.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.elastic import killed
from benchmarks.photos import Photos, write_photos
from benchmarks.shuffle import SAMPLES, SHARD, SHARDS, WINDOWS, streams, unevenness
from benchmarks.table import print_table, save, spread
from benchmarks.vast import ids_near, write_vast_index
from pretrain.images.transforms import TrainImages
from pretrain.index.index import Index
from pretrain.progress import Progress
from pretrain.stream.loader import Batch, LoaderOptions, TrainLoader
from pretrain.stream.order import Order

VAST, VAST_BATCH, VAST_WORLD = 300_000_000, 4096, 64
BATCH = 64
PARTS = (0.01, 0.5, 0.99)  # of an epoch
THREADS = 2


def first_batch(index_path: Path, batch: int, world: int, part: float) -> float:
    """Seconds from the path of an index to rank 0's first 64 images at that part of the first epoch."""
    began = time.perf_counter()
    index = Index.open(index_path)
    order = Order(index.samples, batch, seed=0)
    step = int(part * index.samples / batch)
    with TrainLoader(
        index,
        order,
        TrainImages(32, 3, seed=0),
        LoaderOptions(world=world, workers=THREADS),
        micro_batch=BATCH,
        start_step=step,
    ) as batches:
        next(batches)
        return time.perf_counter() - began


def opening(index_path: Path) -> dict[str, float]:
    """Seconds in which an index opens and tells one extent, anonymous bytes of that, and seconds to hash all of it."""
    before, began = _kernel("status", "RssAnon"), time.perf_counter()
    index = Index.open(index_path)
    index.extents([index.samples - 1])
    opened, anonymous = time.perf_counter() - began, _kernel("status", "RssAnon") - before
    index.files[0].rehash()
    return {"seconds": opened, "anonymous": anonymous * 1024, "hash_seconds": time.perf_counter() - began - opened}


def vast_index(small: Photos, folder: Path) -> Path:
    """An index of 3·10⁸ samples, of which those that rank 0 resumes with are there."""
    vast = Order(VAST, VAST_BATCH, seed=0)
    used = [ids_near(vast, int(part * VAST / VAST_BATCH), 0, VAST_WORLD) for part in PARTS]
    return write_vast_index(folder, small.shards, VAST, np.unique(np.concatenate(used)))


def resume(small: Photos, index: Path, repeats: int) -> dict[str, list[float]]:
    """First-batch seconds: "set, part" -> one a round."""
    sets = {
        f"{small.count:,} samples": (small.shards, BATCH, 1),
        f"3·10⁸ samples, 1 of {VAST_WORLD} ranks": (index, VAST_BATCH, VAST_WORLD),
    }
    found: dict[str, list[float]] = {f"{name}, {part:.0%}": [] for name in sets for part in PARTS}
    with Progress("resuming", "times", (repeats + 1) * len(found)) as progress:
        for number in range(repeats + 1):
            for name, (path, batch, world) in sets.items():
                for part in PARTS:
                    seconds = first_batch(path, batch, world, part)
                    if number:  # the first round warms up
                        found[f"{name}, {part:.0%}"].append(seconds)
                    progress.advance()
    return found


def order_seconds(repeats: int) -> list[float]:
    """Making the order of a run over 3·10⁸ samples and asking it for one batch of 4,096, at random steps."""
    found = []
    for step in np.random.default_rng(0).integers(0, 10 * VAST // VAST_BATCH, repeats + 1).tolist():
        began = time.perf_counter()
        Order(VAST, VAST_BATCH, seed=0).ids(step)
        found.append(time.perf_counter() - began)
    return found[1:]


def peer_order_seconds(samples: int) -> float | None:
    """MosaicML's order of one epoch, which a resume waits for. None where it is not installed."""
    if not importlib.util.find_spec("streaming"):
        return None
    from streaming.base.shuffle import get_shuffle

    began = time.perf_counter()
    get_shuffle("py1e", np.full(samples // 10_000, 10_000), 1, 0, 0, 4_000_000)
    return time.perf_counter() - began


def peak_memory(shards: Path) -> dict[str, int]:
    """One epoch: bytes of anonymous memory before anything is open, and the most after any batch."""
    before, most = _kernel("status", "RssAnon") * 1024, 0
    for _ in _epochs(shards, 1, 0, 1):
        most = max(most, _kernel("status", "RssAnon") * 1024)
    return {"before": before, "most": most}


def bytes_asked(shards: Path, world: int) -> int:
    """Bytes read from files by all ranks, one after the other, over two epochs."""
    next(_epochs(shards, world, 0, 1))  # what is imported late
    before = _kernel("io", "rchar")
    for rank in range(world):
        for _ in _epochs(shards, world, rank, 2):
            pass
    return _kernel("io", "rchar") - before


def _epochs(shards: Path, world: int, rank: int, epochs: int) -> Iterator[Batch]:
    """A rank's batches of the first epochs."""
    index = Index.open(shards)
    order = Order(index.samples, BATCH, seed=0)
    with _loader(index, order, LoaderOptions(rank, world, THREADS), epochs * index.samples // BATCH) as batches:
        yield from batches


def _loader(index: Index, order: Order, options: LoaderOptions, stop_step: int) -> TrainLoader:
    micro_batch = order.global_batch // options.world
    return TrainLoader(index, order, TrainImages(32, 3, seed=0), options, micro_batch=micro_batch, stop_step=stop_step)


def _kernel(file: str, name: str) -> int:
    """A number that /proc tells of this process."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_a_fresh_process(work: Callable[..., Any], *args: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.apply(work, args)


def show_opening(found: list[dict[str, float]]) -> None:
    kinds = {
        "to open, ms": ("seconds", 1e3, ".1f", "≤ 1,000"),
        "anonymous memory, MiB": ("anonymous", 2**-20, ".1f", "≤ 200"),
        "to hash whole, s": ("hash_seconds", 1, ".1f", ""),
    }
    rows = [
        [name, *spread([scale * each[key] for each in found], form), aim]
        for name, (key, scale, form, aim) in kinds.items()
    ]
    print_table("An index of 3·10⁸ samples", ["", "median", "low – high", "aim"], rows)


def show_resume(found: dict[str, list[float]]) -> None:
    rows = []
    for name, seconds in found.items():
        origin, _, part = name.rpartition(", ")
        first = statistics.median(found[f"{origin}, {PARTS[0]:.0%}"])
        aim = "≤ 1.20" if part == f"{PARTS[-1]:.0%}" else ""
        rows.append([name, *spread([1e3 * s for s in seconds]), f"{statistics.median(seconds) / first:.2f}", aim])
    print_table("First batch after a resume", ["place", "ms", "low – high", "÷ 1 %", "aim"], rows)


def show_order(seconds: list[float], peer_samples: int, peer: float | None) -> None:
    rows = [["vit-foundry, a batch of 4,096 of 3·10⁸", *spread([1e3 * s for s in seconds], ".1f"), "≤ 10"]]
    if peer is not None:
        rows.append([f"MosaicML py1e, the epoch, N = {peer_samples:,}", f"{1e3 * peer:.0f}", "", ""])
    print_table("Order at any position", ["what", "ms", "low – high", "aim"], rows)


def show_kills(found: dict[str, int]) -> None:
    title = "Killed at random steps, resumed on 1, 2, 4, 3, … ranks and 1 to 3 threads"
    print_table(title, ["", "count"], [[name, f"{count:,}"] for name, count in found.items()])


def show_memory(found: dict[str, dict[str, int]]) -> None:
    rows = []
    for name, sizes in found.items():
        before, most = (sizes[at] / 2**20 for at in ("before", "most"))
        rows.append([name, f"{before:.0f}", f"{most:.0f}", f"{most - before:.0f}"])
    print_table("Anonymous memory over an epoch, MiB (aim: flat)", ["set", "before", "most", "growth"], rows)


def show_reading(found: dict[int, int], places: int, images: int) -> None:
    rows = [[str(world), f"{size / places:.4f}", "≤ 1.02", f"{size / images:.4f}"] for world, size in found.items()]
    header = ["ranks", "÷ bytes of the samples in the shards", "aim", "÷ bytes of the images alone"]
    print_table("Bytes read", header, rows)


def show_shuffle(found: dict[str, list[float]]) -> None:
    title = f"Shuffle: χ²/df of class counts, {SAMPLES:,} samples, {SHARDS} classes, one a shard of {SHARD:,}, B = 256"
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in found.items()]
    print_table(title, ["stream, in windows of batches", *map(str, WINDOWS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="does it run? its figures mean little")
    args = parser.parse_args()
    if args.quick:
        args.repeats = 2
    shrink = 10 if args.quick else 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        small = write_photos(folder / "resume", 20_000, 64, 64, shard=10_000)
        vast = vast_index(small, folder)
        opened = [in_a_fresh_process(opening, vast) for _ in range(5)]
        show_opening(opened)
        resumed = resume(small, vast, args.repeats)
        show_resume(resumed)

        ordered = order_seconds(4 * args.repeats)
        peer_samples = 30_000_000 // shrink
        peer = peer_order_seconds(peer_samples)
        show_order(ordered, peer_samples, peer)

        kills = killed(write_photos(folder / "kills", 1_009, 64, 64, shard=100).shards)
        show_kills(kills)

        memory = {}
        for count in (6_000 // shrink, 60_000 // shrink):
            shards = write_photos(folder / f"memory{count}", count, 64, 64, shard=1_000).shards
            memory[f"{count:,} images"] = in_a_fresh_process(peak_memory, shards)
        show_memory(memory)

        large = write_photos(folder / "reading", 1_920 // shrink)  # whole batches
        samples = 2 * sum(shard.data_end for shard in Index.open(large.shards).shards)
        images = 2 * sum(map(len, large.encoded()))
        read = {world: in_a_fresh_process(bytes_asked, large.shards, world) for world in (1, 2, 8)}
        show_reading(read, samples, images)

    shuffled = {name: [unevenness(classes, window) for window in WINDOWS] for name, classes in streams()}
    show_shuffle(shuffled)
    save(
        "stream",
        {
            "opening": opened,
            "first_batch_seconds": resumed,
            "order_seconds": ordered,
            "peer_order_seconds": {str(peer_samples): peer},
            "kills": kills,
            "anonymous_bytes": memory,
            "bytes_read": {"ranks": read, "of_samples": samples, "of_images": images},
            "chi_squared_per_df": {name: dict(zip(WINDOWS, values, strict=True)) for name, values in shuffled.items()},
        },
    )


if __name__ == "__main__":
    main()
