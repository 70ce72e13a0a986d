"""Images per second from shards to uint8 batches: this loader, webdataset's, and the bare work on the same threads.

    python benchmarks/loader.py [--threads 1,2] [--images 1500] [--rounds 3]

JPEG 500×375, quality 90, cropped to 224 px (inception crop, flip). The contenders take turns within each round; the
table holds medians and the spread over rounds. JSON beside it: runs/bench/loader.json.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from pretrain.stream.images import TrainImages
from pretrain.stream.index import Index
from pretrain.stream.loader import TrainLoader
from pretrain.stream.order import Order
from pretrain.stream.scan import index_shards

SIZE, BATCH = 224, 64


def write_shards(folder: Path, images: int) -> list[str]:
    """JPEG crops of two photographs, 500 to a shard."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    draw = np.random.default_rng(0)
    urls = []
    for first in range(0, images, 500):
        urls.append(str(folder / f"{first // 500:04d}.tar"))
        with wds.TarWriter(urls[-1]) as tar:
            for number in range(first, min(first + 500, images)):
                photo = photos[number % len(photos)]
                left, top = draw.integers(photo.width - 500 + 1), draw.integers(photo.height - 375 + 1)
                data = io.BytesIO()
                photo.crop((left, top, left + 500, top + 375)).save(data, "JPEG", quality=90)
                tar.write({"__key__": f"{number:07d}", "jpg": data.getvalue(), "cls": str(number % 10)})
    return urls


def ours(folder: Path, threads: int) -> float:
    index = Index.open(folder)
    order = Order(index.samples, BATCH, seed=0)
    images = TrainImages(SIZE, 3, seed=0)
    steps = index.samples // BATCH
    began = time.perf_counter()
    with TrainLoader(
        index, order, images, micro_batch=BATCH, rank=0, world=1, workers=threads, stop_step=steps
    ) as batches:
        count = sum(len(batch.ids) for batch in batches)
    return count / (time.perf_counter() - began)


def bare(folder: Path, threads: int) -> float:
    """The same decode and crop on the same number of threads: no order, no batches, the bytes already in memory."""
    samples = [sample["jpg"] for sample in wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)]
    samples = samples[: len(samples) // BATCH * BATCH]
    images = TrainImages(SIZE, 3, seed=0)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        began = time.perf_counter()
        parts = [range(start, len(samples), threads) for start in range(threads)]
        list(pool.map(lambda part: [images(samples[number], 0, number) for number in part], parts))
        return len(samples) / (time.perf_counter() - began)


def webdataset_pil(folder: Path, workers: int) -> float:
    transform = v2.Compose(
        [v2.RandomResizedCrop(SIZE, scale=(0.05, 1.0), antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    shards = sorted(map(str, folder.glob("*.tar")))
    data = (
        wds.WebDataset(shards, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH, partial=False)
    )
    began = time.perf_counter()
    count = sum(len(labels) for _, labels in DataLoader(data, batch_size=None, num_workers=workers))
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    contenders: dict[str, Callable[[Path, int], float]] = {
        "vit-foundry": ours,
        "bare decode + crop": bare,
        "webdataset + PIL": webdataset_pil,
    }
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        index_shards(write_shards(folder, args.images), folder / "index.vfi")
        for _ in range(args.rounds):
            for threads in map(int, args.threads.split(",")):
                for name, rate in contenders.items():
                    rates.setdefault(f"{name}, {threads}", []).append(rate(folder, threads))
    print(f"{'contender, threads or workers':34} images/s   low – high")
    for name, found in rates.items():
        print(f"{name:34} {statistics.median(found):8.0f}   {min(found):.0f} – {max(found):.0f}")
    out = Path("runs/bench/loader.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"images_per_second": rates, "images": args.images, "batch": BATCH}, indent=1))
    print(f"\n{out}")


if __name__ == "__main__":
    main()
