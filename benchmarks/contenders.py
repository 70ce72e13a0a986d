"""Endless streams of training batches, by this loader and by its peers: the same JPEGs, the same crop.

Inception crop (area 0.05–1, aspect 3/4–4/3) to 224 px, flip, batches of 64 as uint8 [64, 3, 224, 224]. Each peer
as its documentation would have it at its fastest, and alike in this: worker processes that stay, torch's one
thread in each, collation into shared memory, the shuffle buffer of its examples, batches made to float by the
process that trains (in the workers it is slower: four times the bytes to copy through).
"""

import importlib.util
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode
from torchvision.transforms import v2

from benchmarks.photos import Photos
from pretrain.images.transforms import TrainImages, to_float
from pretrain.index.index import Index
from pretrain.stream.loader import LoaderOptions, TrainLoader
from pretrain.stream.order import Order

SIZE, BATCH = 224, 64
AREA, ASPECT = (0.05, 1.0), (3 / 4, 4 / 3)

Batches = Generator[Tensor, None, None]


@dataclass(frozen=True)
class Contender:
    """`uint8(photos, workers)` gives batches for ever; `floats`, where the peer has its own way to them."""

    name: str
    uint8: Callable[[Photos, int], Batches]
    floats: Callable[[Photos, int], Batches] | None = None
    needs: str | None = None

    @property
    def missing(self) -> bool:
        return self.needs is not None and importlib.util.find_spec(self.needs) is None

    def batches(self, photos: Photos, workers: int, kind: str) -> Batches:
        """`kind`: uint8, or float: fp32 in [-1, 1]."""
        if kind == "uint8":
            return self.uint8(photos, workers)
        return (self.floats or partial(_as_floats, self.uint8))(photos, workers)


def ours(photos: Photos, threads: int, floats: bool = False) -> Batches:
    index = Index.open(photos.shards)
    order = Order(index.samples, BATCH, seed=0)
    images = TrainImages(SIZE, 3, seed=0, area=AREA, aspect=ASPECT)
    with TrainLoader(index, order, images, LoaderOptions(workers=threads, floats=floats), micro_batch=BATCH) as loader:
        for batch in loader:
            yield batch.images


def webdataset_pil(photos: Photos, workers: int) -> Batches:
    crop = v2.RandomResizedCrop(SIZE, AREA, ASPECT, antialias=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return _webdataset(photos, workers, lambda data: data.decode("pil"), transform)


def webdataset_torchvision(photos: Photos, workers: int) -> Batches:
    crop = v2.RandomResizedCrop(SIZE, AREA, ASPECT, antialias=True)
    transform = v2.Compose([decode_bytes, crop, v2.RandomHorizontalFlip()])
    return _webdataset(photos, workers, lambda data: data, transform)


def _webdataset(photos: Photos, workers: int, decode: Callable[[Any], Any], transform: v2.Compose) -> Batches:
    data = webdataset.WebDataset(photos.tars, shardshuffle=100).shuffle(1000)
    data = decode(data).to_tuple("jpg", "cls").map_tuple(transform, int)
    data = data.batched(BATCH, partial=False, collation_fn=default_collate).repeat()
    return _images(webdataset.WebLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4))


def timm_uint8(photos: Photos, workers: int) -> Batches:
    # timm's workers hand over uint8; its PrefetchLoader makes floats of them.
    return _images(_timm(photos, workers).loader)


def timm_floats(photos: Photos, workers: int) -> Batches:
    return _images(_timm(photos, workers))


def _timm(photos: Photos, workers: int) -> Any:
    import timm.data

    logging.getLogger("timm").setLevel(logging.ERROR)  # it misses a list of the shards, and is told them
    names = f"{{{0:06d}..{len(photos.tars) - 1:06d}}}.tar"
    data = timm.data.create_dataset(
        "wds/photos", str(photos.shards), split=names, is_training=True, batch_size=BATCH, num_samples=1_000_000
    )
    return timm.data.create_loader(
        data,
        (3, SIZE, SIZE),
        BATCH,
        is_training=True,
        scale=AREA,
        ratio=ASPECT,
        color_jitter=None,
        interpolation="bilinear",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_workers=workers,
        device=torch.device("cpu"),
    )


def image_folder(photos: Photos, workers: int) -> Batches:
    crop = v2.RandomResizedCrop(SIZE, AREA, ASPECT, antialias=True)
    data = ImageFolder(str(photos.files), v2.Compose([crop, v2.RandomHorizontalFlip()]), loader=_decode_file)
    loader = DataLoader(
        data, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True, prefetch_factor=4
    )
    return _images(loader)


def mosaic(photos: Photos, workers: int) -> Batches:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    crop = v2.RandomResizedCrop(SIZE, AREA, ASPECT, antialias=True)
    transform = v2.Compose([decode_bytes, crop, v2.RandomHorizontalFlip()])

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            sample = super().__getitem__(at)
            return transform(sample["jpg"]), sample["cls"]

    clean_stale_shared_memory()
    data = Images(local=str(photos.mds), shuffle=True, batch_size=BATCH)
    loader = DataLoader(data, BATCH, drop_last=True, num_workers=workers, persistent_workers=True, prefetch_factor=4)
    return _images(loader)


CONTENDERS = (
    Contender("vit-foundry", ours, partial(ours, floats=True)),
    Contender("webdataset + PIL", webdataset_pil),
    Contender("webdataset + torchvision.io", webdataset_torchvision),
    Contender("timm, wds reader", timm_uint8, timm_floats, needs="timm"),
    Contender("ImageFolder + torchvision.io", image_folder),
    Contender("MosaicML streaming", mosaic, needs="streaming"),
)


def _images(loader: Any) -> Batches:
    while True:
        for images, _ in loader:
            yield images


def _as_floats(uint8: Callable[[Photos, int], Batches], photos: Photos, workers: int) -> Batches:
    for images in uint8(photos, workers):
        yield to_float(images, torch.float32)


def decode_bytes(data: bytes) -> Tensor:
    """A JPEG as the peers' users decode it: uint8 [3, h, w]."""
    return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def _decode_file(path: str) -> Tensor:
    return torchvision.io.decode_jpeg(torchvision.io.read_file(path), ImageReadMode.RGB)
