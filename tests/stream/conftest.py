"""Small shards of real encoded images, indexed as users index theirs."""

import importlib.util
import io
import tarfile
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


@pytest.fixture(scope="session")
def make_tar():
    """make_tar(path, members, …) -> path: a tar of (name, data) or (name, data, fields of its header)."""

    def make(path, members, **options):
        with tarfile.open(path, "w", **{"format": tarfile.USTAR_FORMAT, **options}) as tar:
            for name, data, *fields in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                for field, value in (fields[0] if fields else {}).items():
                    setattr(info, field, value)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture(scope="session")
def plain():
    """plain(first, count, label=…) -> members of good samples, though their images are none."""
    image = b"not decoded by the scanner" * 60  # three blocks and a bit

    def members(first, count, label=lambda number: number % 5):
        pairs = [
            ((f"{n:04d}.cls", b"%d" % label(n)), (f"{n:04d}.jpg", image + b"%d" % n))
            for n in range(first, first + count)
        ]
        return [member for pair in pairs for member in pair]

    return members


@pytest.fixture
def serve(monkeypatch):
    """serve(folder) -> a Loopback (loopback.py): its files at .http, .s3 and .gs, with faults to script."""
    found = importlib.util.spec_from_file_location("loopback", Path(__file__).with_name("loopback.py"))
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    servers = []

    def serve(folder):
        servers.append(module.Loopback(folder))
        for name, value in servers[-1].environment.items():
            monkeypatch.setenv(name, value)
        return servers[-1]

    yield serve
    for server in servers:
        server.close()
