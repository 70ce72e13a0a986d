"""What several rooms' tests need: small shards of real images, a server of them, and commands run as users run them."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.multiprocessing import start_processes

from benchmarks.started import Forked, warm_up
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.pieces import write_share
from pretrain.datasets.dataset import Dataset, array_dataset
from pretrain.datasets.sources import open_source
from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.shards.scan import index_shards
from pretrain.shards.write import write_shards as build_shards

ROOT = Path(__file__).resolve().parent.parent
# DS_ACCELERATOR=cuda: on a GPU, those tests that take `RANKS` ranks.
ACCELERATOR = os.environ.get("DS_ACCELERATOR", "cpu")
RANKS = 2 if ACCELERATOR == "cpu" else 1
# A rank that does not speak leaves the others time to; a launcher would end it, and here nothing does.
_HASTY = "from pretrain.ranks import command; command._OTHERS_FIRST = 0.0"


@pytest.fixture(scope="session")
def real() -> Callable[..., subprocess.CompletedProcess[str]]:
    """real(*words): a command as users start it, from the repository's root, on one thread a process."""

    def real(*words: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"DS_ACCELERATOR": "cpu", **os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
        words = tuple(str(word) for word in words)
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)

    return real


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run("launch/pretrain.py", *words, ranks=1): the command's status (a list where ranks differ) and both outputs.

    Its ranks are forked from a parent that has imported everything; `real` starts what users start.
    """
    outputs = tmp_path_factory.mktemp("outputs")

    def run(script, *words: object, ranks: int = 1, prelude: str = "", folder: Path = ROOT, timeout: float = 600):
        told, errors = (outputs / f"{len(list(outputs.iterdir()))}.{stream}" for stream in ("out", "err"))
        prelude = f"{_HASTY}\n{prelude}" if ranks > 1 else prelude
        forked = Forked(ranks, words, told, script=script, prelude=prelude, errors=errors, folder=folder)
        try:
            statuses = forked.wait(timeout)
        finally:
            forked.kill()
        status = statuses[0] if len(set(statuses)) == 1 else statuses
        return subprocess.CompletedProcess([script, *words], status, *(f.read_text("utf-8") for f in (told, errors)))

    return run


@pytest.fixture(scope="session")
def ranks(run, real) -> Callable[..., None]:
    """Run a Python script as `count` ranks of one process group; any rank that fails fails the test with its words."""

    def ranks(count: int, script: Path, *words: object, timeout: float = 600) -> None:
        if ACCELERATOR == "cpu":
            done = run(script, *words, ranks=count, timeout=timeout)
        else:  # whose driver cannot be used after a fork; one device is one rank
            assert count == 1
            paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            done = real("env", f"PYTHONPATH={paths}", sys.executable, script, *words, timeout=timeout)
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"

    return ranks


@pytest.fixture(scope="session")
def spread() -> Callable[..., None]:
    """spread(function, *arguments): function(rank, *arguments) in two warm processes."""

    def spread(function: Callable[..., None], *arguments: object) -> None:
        warm_up()
        start_processes(function, arguments, nprocs=2, start_method="forkserver")

    return spread


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scikit-learn's digits: `train` (8×8 grey, 10 classes) and `test`. Read only.

    Without scikit-learn, as on a bare GPU machine: drawn stripes, a direction and width for each class.
    """
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        try:
            source = open_source("digits", split, None)
        except (ImportError, InputError):
            source = stripes(split)
        build_shards(source, folder / split)
    return folder


def stripes(split: str) -> Dataset:
    """As many images as there are digits, of ten kinds of stripes under noise."""
    draw, count = np.random.default_rng(split == "train"), {"train": 1442, "test": 355}[split]
    labels = np.arange(count, dtype=np.int32) % 10
    rows, columns = np.mgrid[:8, :8]
    angles, widths = (np.pi / 5 * (labels % 5))[:, None, None], 1.0 + (labels // 5)[:, None, None]
    waves = np.sin((rows * np.sin(angles) + columns * np.cos(angles)) / widths)
    pixels = 127 + 90 * waves + draw.normal(0, 20, waves.shape)
    return array_dataset("stripes", split, pixels.clip(0, 255).astype(np.uint8), labels, list("0123456789"))


@pytest.fixture(scope="session")
def tiny_config(digits: Path) -> Callable[..., Path]:
    """tiny_config(path, model={…}, …) -> path: a config of a small network on the digits; what is given replaces."""

    def tiny_config(path: Path, *, name: str = "tiny", **sections: dict) -> Path:
        tree: dict = {
            "model": {
                "patch_size": 4, "layers": 1, "width": 24, "mlp": 24, "heads": 3,
                "image_size": 8, "channels": 1, "num_classes": 10,
            },
            "data": {"train": str(digits / "train"), "workers": 1},
            "train": {"global_batch": 24, "steps": 30},
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": 5},
            "logging": {"every": 1, "peak_tflops": 1, "tensorboard": False},
        }  # fmt: skip
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        path.write_text(json.dumps({"name": name, **tree}))
        return path

    return tiny_config


def lines(path: Path) -> list[dict]:
    """Of a JSONL file that may be being written, the whole lines."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@dataclass(frozen=True)
class History:
    """What a run folder tells: metrics without the clock's, audits by rank, checkpoints.

    metrics: a dict for each logged line: step, loss, grad_norm, lr, and what evaluations found.
    audits: for each rank, the ids of each step from 0.
    """

    metrics: list[dict]
    audits: list[list[list[int]]]
    checkpoints: list[str]

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of every training line."""
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.metrics if "loss" in line]

    @property
    def ids(self) -> list[list[int]]:
        """The ids of each step, in batch order."""
        return [[number for ids in step for number in ids] for step in zip(*self.audits, strict=True)]

    @property
    def trained(self) -> tuple:
        """What is the same of two runs that trained alike, wherever they were interrupted."""
        return self.losses, self.audits


def history(out: Path) -> History:
    """The history of the run folder `out`, trained by as many ranks throughout."""

    def of_training(key: str) -> bool:
        return key in ("step", "loss", "grad_norm", "lr") or "eval/" in key or "fewshot/" in key

    metrics = [{k: v for k, v in line.items() if of_training(k)} for line in lines(out / "metrics.jsonl")]
    audits = [lines(path) for path in sorted((out / "audit").glob("rank_?????.jsonl"))]
    assert all([line["step"] for line in audit] == list(range(len(audit))) for audit in audits)
    kept = sorted(path.name for path in (out / "checkpoints").glob("*/"))
    return History(metrics, [[line["ids"] for line in audit] for audit in audits], kept)


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

    average: a model whose weights are kept as their average. Further keywords go into the checkpoint's state.
    """

    def write(path, model, step=3, average=None, **state):
        named = [(name, parameter.detach().flatten()) for name, parameter in model.named_parameters()]
        pieces = [(name, 0, len(values)) for name, values in named]
        places = {name: 0 for name, _ in named}  # of no weight here: nothing resumes
        folder = path / "checkpoints"
        values = {"weight": [values for _, values in named]}
        if average is not None:
            values["average"] = [parameter.detach().flatten() for parameter in average.parameters()]
        share = write_share(checkpoints.partial_path(folder, step), 0, pieces, values, places)
        checkpoints.commit(folder, step, [share], {"zero_stage": 0, "model": asdict(model.spec), **state})
        return path

    return write
