"""What several rooms' tests need: small shards of real images, a server of them, and commands run as users run them."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.pieces import write_share
from pretrain.index.index import Index
from pretrain.ranks.launcher import free_port
from pretrain.shards.scan import index_shards

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """One thread a process: the ranks and threads under test share two cores.

    And no long wait for a resolver that loses questions: torch's store looks up the name of whoever connects, and
    answers nobody meanwhile.
    """
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    few = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "RES_OPTIONS": "timeout:1 attempts:1"}
    return {**kept, **few, "PATH": path}


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command from the repository's root: words in, status and both outputs out."""

    def run(*words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, run: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """Shards of scikit-learn's digits: `train` (8×8 grey, 10 classes) and `test`."""
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        done = run(sys.executable, "launch/shards.py", "build", "digits", folder / split, "--split", split)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def ranks() -> Callable[..., None]:
    """Run a Python script as `count` ranks of one process group; any rank that fails fails the test with its words."""

    def ranks(count: int, script: Path, *words: object, timeout: float = 300) -> None:
        place = {
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "PYTHONPATH": str(ROOT),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, words)],
                cwd=ROOT,
                env={**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            said: Sequence[str] = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), "\n".join(said)

    return ranks


# Small shards of real encoded images, indexed as users index theirs.

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


@pytest.fixture(scope="session")
def run_folder():
    """run_folder(path, model, step=3, average=None): `path` as a run folder with a checkpoint of the model's weights.

    average: a model whose weights are kept as their average.
    """

    def write(path, model, step=3, average=None):
        named = [(name, parameter.detach().flatten()) for name, parameter in model.named_parameters()]
        pieces = [(name, 0, len(values)) for name, values in named]
        places = {name: 0 for name, _ in named}  # of no weight here: nothing resumes
        folder = path / "checkpoints"
        values = {"weight": [values for _, values in named]}
        if average is not None:
            values["average"] = [parameter.detach().flatten() for parameter in average.parameters()]
        share = write_share(checkpoints.partial_path(folder, step), 0, pieces, values, places)
        checkpoints.commit(folder, step, [share], {"zero_stage": 0, "model": asdict(model.spec)})
        return path

    return write
