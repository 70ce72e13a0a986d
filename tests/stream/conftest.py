"""Small shards of real encoded images, indexed as users index theirs."""

import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pretrain.stream.index import Index
from pretrain.stream.scan import index_shards

SUFFIXES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Shards:
    """A folder of shards, and what was put into them: by canonical id."""

    folder: Path
    keys: list[str]
    images: list[bytes]
    labels: list

    @property
    def index(self) -> Index:
        return Index.open(self.folder)

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:03d}.tar"


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(key: str, height: int, width: int) -> np.ndarray:
    """Pixels that tell one sample from every other."""
    return np.random.default_rng(zlib.crc32(key.encode())).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(folder: Path, sizes, *, side=12, labels=None, replace=None, suffixes=("png", "jpg", "webp")) -> Shards:
    """Shards of `sizes` samples each; `replace` puts other bytes in the place of some ids."""
    folder.mkdir(parents=True)
    keys, images, all_labels = [], [], []
    for number, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"shard-{number:03d}.tar")) as tar:
            for _ in range(size):
                sample_id = len(keys)
                key, suffix = f"sample/{sample_id:06d}", suffixes[sample_id % len(suffixes)]
                image = encode(noise(key, side, side + sample_id % 5), SUFFIXES[suffix])
                image = (replace or {}).get(sample_id, image)
                label = labels(sample_id) if labels else sample_id % 7
                named = {"json": label} if isinstance(label, list) else {"cls": label}
                tar.write({"__key__": key, suffix: image, "txt": f"sample {sample_id}", **named})
                keys.append(key)
                images.append(image)
                all_labels.append(label)
    index_shards([folder], workers=1)
    return Shards(folder, keys, images, all_labels)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Shards:
    """203 samples in uneven shards: chunks of 8 span two shards, and a rest stays over. Read only."""
    return write(tmp_path_factory.mktemp("shards") / "set", [50, 37, 1, 64, 51])


@pytest.fixture
def write_shards(tmp_path):
    """Shards of one's own: write_shards(name, sizes, …)."""
    return lambda name, sizes, **options: write(tmp_path / name, sizes, **options)


@pytest.fixture(scope="session")
def encoded():
    """encoded(pixels uint8, kind="PNG", …) -> bytes."""
    return encode
