"""Images per second from storage to training batches: this loader, its peers, and the bare work on as many threads.

    python benchmarks/loader.py [--rounds 5] [--images 4096] [--batches 32] [--quick]

JPEG 500×375, quality 90, pages cached, cropped to 224 px in batches of 64: as uint8, and as fp32 in [-1, 1]; with one
and with two decode threads or worker processes. benchmarks/contenders.py tells how each is set up. In a round every
contender runs once in each setting, the first in turn; the clock starts after 8 batches, when workers and shuffle
buffers are under way. Ratios are taken within a round; tables hold medians and the spread over rounds,
runs/bench/loader.json every figure. About ten minutes on two cores.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import gc
import io
import itertools
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from benchmarks.contenders import AREA, ASPECT, BATCH, CONTENDERS, SIZE, Batches, decode_bytes
from benchmarks.photos import Photos, write_photos
from benchmarks.table import print_table, save, spread
from pretrain.hashing import Draws
from pretrain.images.decode import decode
from pretrain.images.transforms import EvalImages, TrainImages, to_float
from pretrain.progress import Progress

WARM = 8  # batches before the clock starts: workers begin at different times, and run ahead of one another by some
KINDS, WORKERS = ("uint8", "float"), (1, 2)
OURS, BARE, PIL = "vit-foundry", "bare decode + crop", "webdataset + PIL"

AIMS = {f"{kind}, 2": (1.4, 2.0, 0.9) for kind in KINDS}  # of the best peer, webdataset + PIL, the bare loop

Setting = tuple[str, int]  # kind, threads or workers
Rates = dict[Setting, dict[str, list[float]]]


def steady_rate(batches: Batches, count: int) -> float:
    """Images per second over `count` batches of a stream that is under way."""
    for _ in range(WARM):
        next(batches)
    began = time.perf_counter()
    images = sum(len(next(batches)) for _ in range(count))
    return images / (time.perf_counter() - began)


def bare_rate(encoded: list[bytes], threads: int, kind: str, count: int) -> float:
    """The same decode and crop of bytes in memory, image by image: no order, no reading, no batches."""
    images = TrainImages(SIZE, 3, seed=0, area=AREA, aspect=ASPECT)
    numbers = iter(range(count * BATCH))  # shared: a thread takes its next image when it is done with one

    def work() -> None:
        torch.set_num_threads(1)
        for number in numbers:
            image = images(decode(encoded[number % len(encoded)], 3), 0, number)
            if kind == "float":
                to_float(image, torch.float32)

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for thread in [pool.submit(work) for _ in range(threads)]:
            thread.result()
        return count * BATCH / (time.perf_counter() - began)


def measure(photos: Photos, rounds: int, batches: int) -> Rates:
    """Every contender in every setting once a round, from another contender on in each."""
    encoded = photos.encoded()
    runners = {contender.name: contender for contender in CONTENDERS if not contender.missing}
    names = [*runners, BARE]
    rates: Rates = {setting: {name: [] for name in names} for setting in itertools.product(KINDS, WORKERS)}
    with Progress("measuring", "runs", rounds * len(rates) * len(names)) as progress:
        for number in range(rounds):
            at = number % len(names)
            for (kind, workers), found in rates.items():
                for name in names[at:] + names[:at]:
                    if name == BARE:
                        rate = bare_rate(encoded, workers, kind, batches)
                    else:
                        stream = runners[name].batches(photos, workers, kind)
                        rate = steady_rate(stream, batches)
                        stream.close()
                    found[name].append(rate)
                    progress.advance()
    return rates


def ratios(rates: Rates) -> dict[str, dict[str, list[float]]]:
    """This loader against the best peer (by median), webdataset + PIL and the bare loop, round by round."""
    found: dict[str, dict[str, list[float]]] = {}
    for (kind, workers), rows in rates.items():
        peers = {name: statistics.median(values) for name, values in rows.items() if name not in (OURS, BARE)}
        best = max(peers, key=peers.__getitem__)
        found[f"{kind}, {workers}"] = {
            label: [own / other for own, other in zip(rows[OURS], rows[name], strict=True)]
            for label, name in ((f"best peer ({best})", best), (PIL, PIL), (BARE, BARE))
        }
    return found


def pixel_differences(encoded: list[bytes]) -> dict[str, float]:
    """Mean |difference|, in grey levels of 255, between our resizing and the peers' own of the same boxes."""
    train, evaluate = TrainImages(SIZE, 3, seed=0, area=AREA, aspect=ASPECT, flip=False), EvalImages(SIZE, 3)
    found: dict[str, list[float]] = {}
    for number, data in enumerate(encoded):
        pixels = decode(data, 3)
        box = train.crop(*pixels.shape[1:], Draws(0, 0, number))
        for peer, picture in (("Pillow", Image.open(io.BytesIO(data))), ("torchvision.io", decode_bytes(data))):
            pairs = {
                "training crop": (train, F.resized_crop(picture, *box, [SIZE, SIZE], antialias=True)),
                "evaluation": (evaluate, F.center_crop(F.resize(picture, [256], antialias=True), [SIZE, SIZE])),
            }
            for what, (transform, theirs) in pairs.items():
                difference = transform(pixels, 0, number).int() - F.to_image(theirs).int()
                found.setdefault(f"{what}, {peer}", []).append(difference.abs().double().mean().item())
    return {name: statistics.mean(values) for name, values in found.items()}


def show(rates: Rates, differences: dict[str, float]) -> None:
    """The tables, and the file with every figure."""
    for kind in KINDS:
        header = [f"to {kind} batches, images/s"]
        for workers in WORKERS:
            header += [f"{workers} thread or worker" if workers == 1 else f"{workers}", "low – high"]
        names = rates[kind, WORKERS[0]]
        rows = [[name, *(cell for workers in WORKERS for cell in spread(rates[kind, workers][name]))] for name in names]
        rows += [[contender.name, "not installed", "", "", ""] for contender in CONTENDERS if contender.missing]
        print_table("Loaders", header, rows)
    compared = ratios(rates)
    rows = [
        [at, name, *spread(values, ".2f"), f"≥ {AIMS[at][number]:.1f}" if at in AIMS else ""]
        for at, found in compared.items()
        for number, (name, values) in enumerate(found.items())
    ]
    header = ["to batches of, threads", "times", "ratio", "low – high", "aim"]
    print_table("This loader's images/s, as a multiple of another's", header, rows, names=2)
    rows = [[name, f"{value:.2f}", "≤ 2"] for name, value in differences.items()]
    print_table("This loader's pixels and the peers' own", ["resize, peer", "mean |difference| of 255", "aim"], rows)
    save(
        "loader",
        {
            "images_per_second": {f"{kind}, {workers}": found for (kind, workers), found in rates.items()},
            "ratios": compared,
            "mean_difference_of_255": differences,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=32, help="timed, in every run")
    parser.add_argument("--quick", action="store_true", help="does it run? its figures mean little")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.images, args.batches = 1, 512, 2
    gc.freeze()  # as a run does before its first step; worker processes inherit it
    torch.set_num_threads(1)  # in the process that trains; workers and decode threads have theirs
    torch.multiprocessing.set_start_method("fork")  # the quickest, and what most peers' users have
    with tempfile.TemporaryDirectory() as place:
        tempfile.tempdir = place  # some peers leave locks there
        photos = write_photos(Path(place), args.images, peers=True)
        rates = measure(photos, args.rounds, args.batches)
        differences = pixel_differences(photos.encoded()[:128])
    show(rates, differences)


if __name__ == "__main__":
    main()
