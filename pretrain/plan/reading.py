"""What a run reads and writes: cores that decode, bytes and requests from storage, checkpoints, the time of a stop."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import InputError
from pretrain.index.index import Index
from pretrain.plan.job import Job

# Milliseconds of a decode thread for an image: `benchmarks/loader.py` on JPEGs of 500×375, cropped to 224 px: 1,057
# images/s with one thread (docs/stream.md). A loader's threads share an interpreter; two reached 1.8 times as much.
DECODE_MS = 0.95
# Bytes of an image where there is no index to ask: the mean of ImageNet's JPEGs. Around it a tar has headers, a label
# and padding.
IMAGE_BYTES = 110_000
_TAR_BYTES = 2_300
# The sets that shipped recipes are for, by their number of classes: their training images.
_SETS = {
    18_291: ("JFT-300M", 303_000_000),
    21_843: ("ImageNet-21k", 14_197_122),
    1_000: ("ImageNet-1k", 1_281_167),
}
STORAGE = 2e9  # bytes/s that the run folder's file system takes from all ranks together
# Seconds that are given to a rank that is asked to stop: by DeepSpeed's launcher before it kills it (and Slurm's
# KillWait after scancel), and by `launch/slurm.sbatch` before the time limit (--signal=USR1@120).
LAUNCHER_GRACE, SLURM_NOTICE = 30.0, 120.0


@dataclass(frozen=True)
class DataSet:
    """What is read. `sample_bytes` is a sample's share of its shard."""

    samples: int | None  # None: not known
    sample_bytes: float
    said: tuple[str, ...] = ()  # what was assumed


@dataclass(frozen=True)
class Reading:
    """What the whole run asks of cores and storage while it trains."""

    images_per_second: float
    cores: float
    bytes_per_second: float
    requests_per_second: float


@dataclass(frozen=True)
class Stop:
    """What a stop takes: the step under way with all its micro-batches, and the save."""

    step: float  # seconds
    save: float  # seconds

    @property
    def grace(self) -> float:
        """Seconds from the signal to the end."""
        return self.step + self.save


def data_set(job: Job, classes: int, samples: int | None, image_bytes: float | None) -> DataSet:
    """What the run reads: as told; else by the index; else the set that a recipe for so many classes is for.

    Raises:
        InputError: the index of `data.train` cannot be opened.
    """
    said: list[str] = []
    of_index = None
    if job.data.train is not None:
        index = Index.open(job.data.train)
        held = 1 - job.data.held_out
        samples = samples or round(index.samples * held)
        of_index = index.bytes / index.samples
    elif samples is None and classes in _SETS:
        name, samples = _SETS[classes]
        said.append(f"{samples:,} samples: {name}'s, which has {classes:,} classes (data.train is null; --samples)")
    if image_bytes is not None:
        return DataSet(samples, image_bytes + _TAR_BYTES, tuple(said))
    if of_index is not None:
        return DataSet(samples, of_index, tuple(said))
    said.append(f"{IMAGE_BYTES / 1e3:g} kB an image, ImageNet's mean (--image-bytes)")
    return DataSet(samples, IMAGE_BYTES + _TAR_BYTES, tuple(said))


def run_steps(steps: int | None, epochs: float | None, global_batch: int, samples: int | None) -> int:
    """The steps of a run: as set, or round(epochs · samples / global batch). Raises InputError: not known."""
    if steps is not None:
        return steps
    assert epochs is not None
    if samples is None:
        raise InputError(
            f"train.epochs: {epochs:g} epochs of how many samples? data.train is null; --samples N, "
            "data.train=INDEX or train.steps=N would say"
        )
    return max(round(epochs * samples / global_batch), 1)


def reading(job: Job, step_seconds: float, data: DataSet, decode_ms: float) -> Reading:
    """What training asks of the loaders' cores and of storage, over all ranks, at so many seconds a step.

    Each chunk of `data.chunk` samples is one request; the few that cross a border of shards are two.
    """
    images = job.layout.global_batch / step_seconds
    return Reading(images, images * decode_ms / 1e3, images * data.sample_bytes, images / job.data.chunk)


def checkpoint_bytes(job: Job, parameters: int) -> int:
    """Bytes of a checkpoint: fp32 weights, the optimizer's moments and the average, 4 bytes a value each."""
    moments = 2 if job.optimizer.name == "adamw" else 1 if job.optimizer.momentum else 0
    return 4 * parameters * (1 + moments + (job.optimizer.averaging is not None))
