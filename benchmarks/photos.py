"""The images of the benchmarks: crops of two photographs as JPEG, in the format that each reader wants.

The photographs are scikit-learn's; without it, drawn pictures whose JPEGs are about as large.
"""

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pretrain.shards.scan import index_shards

CLASSES = 10


@dataclass(frozen=True)
class Photos:
    """The same images as tars with their index, and for the other readers as JPEG files and as MDS shards."""

    folder: Path
    count: int

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def tars(self) -> list[str]:
        return sorted(map(str, self.shards.glob("*.tar")))

    @property
    def files(self) -> Path:
        """A folder a class."""
        return self.folder / "files"

    @property
    def mds(self) -> Path:
        return self.folder / "mds"

    def encoded(self) -> list[bytes]:
        """Every image's JPEG, in the order of the index."""
        return [sample["jpg"] for sample in webdataset.WebDataset(self.tars, shardshuffle=False)]


def write_photos(
    folder: Path, count: int, width: int = 500, height: int = 375, *, shard: int = 64, peers: bool = False
) -> Photos:
    """`count` images, quality 90, `shard` to a tar, with an index; with `peers`, in the other formats as well."""
    photos = Photos(folder, count)
    photos.shards.mkdir(parents=True)
    images = list(_crops(count, width, height))
    for first in range(0, count, shard):
        with webdataset.TarWriter(str(photos.shards / f"{first // shard:06d}.tar")) as tar:
            for number in range(first, min(first + shard, count)):
                tar.write({"__key__": f"{number:07d}", "jpg": images[number], "cls": str(number % CLASSES)})
    index_shards([photos.shards], workers=1)
    if peers:
        _write_files(photos.files, images)
        if importlib.util.find_spec("streaming"):
            _write_mds(photos.mds, images)
    return photos


def _crops(count: int, width: int, height: int) -> Iterator[bytes]:
    sources = [Image.fromarray(pixels) for pixels in _pictures()]
    draw = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % len(sources)]
        left, top = draw.integers(source.width - width + 1), draw.integers(source.height - height + 1)
        data = io.BytesIO()
        source.crop((left, top, left + width, top + height)).save(data, "JPEG", quality=90)
        yield data.getvalue()


def _pictures() -> list[np.ndarray]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        draw, (rows, columns) = np.random.default_rng(0), np.mgrid[:427, :640]
        waves = [np.sin(rows / (9 + n) + columns / (7 + 2 * n))[..., None] * [90, 60, 30] for n in range(2)]
        return [(128 + wave + draw.normal(0, 12, (427, 640, 3))).clip(0, 255).astype(np.uint8) for wave in waves]
    return list(load_sample_images().images)


def _write_files(folder: Path, images: list[bytes]) -> None:
    for number, data in enumerate(images):
        path = folder / f"{number % CLASSES}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write_mds(folder: Path, images: list[bytes]) -> None:
    import streaming

    with streaming.MDSWriter(out=str(folder), columns={"jpg": "bytes", "cls": "int"}) as writer:
        for number, data in enumerate(images):
            writer.write({"jpg": data, "cls": number % CLASSES})
