"""Weights from wherever they lie: a run folder, or a checkpoint inside one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pretrain import files
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.pieces import read_tensors
from pretrain.checkpoint.step import STATE, Checkpoint
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.model.positions import resize_to
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer, load_tensors, tensor_shapes
from pretrain.ranks.collectives import is_main, on_main

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Weights:
    """A network's parameters, whole, in fp32 on the CPU."""

    spec: ViTSpec
    tensors: dict[str, Tensor]
    step: int | None
    source: Path  # the checkpoint they were read from
    sha256: str  # of names, shapes and values: the same however many ranks wrote them
    averaged: bool = False  # whether they are the Polyak average
    trained_on: str = ""  # the index's hash; empty where the checkpoint does not record it

    def model(self, image_size: int | None = None) -> VisionTransformer:
        """The network with these weights, on the CPU in eval mode.

        Args:
            image_size: side of its images in pixels, to which learned positions are resized; None: as trained.

        Raises:
            InputError: the image is smaller than a patch.
        """
        model = VisionTransformer(replace(self.spec, image_size=image_size or self.spec.image_size))
        load_tensors(model, resize_to(model.spec, self.tensors), where=f"weights {self.source}")
        return model.eval()

    def preprocess(self, image: Image) -> Tensor:
        """A PIL image as the network takes it: float32 [channels, image_size, image_size] in [-1, 1].

        Resized and cropped as evaluation does it: the shorter side to 8/7 of the image size, then the centre. Alpha is
        dropped and an EXIF orientation is not applied, as in training.
        """
        import torch

        from pretrain.images.decode import from_pillow
        from pretrain.images.transforms import EvalImages, to_float

        pixels = from_pillow(image, self.spec.channels)
        return to_float(EvalImages(self.spec.image_size, self.spec.channels)(pixels, 0, 0), torch.float32)


def load_weights(path: str | Path, *, averaged: bool = False) -> Weights:
    """Read WEIGHTS: a checkpoint, or the newest one of a run folder. Not collective.

    A newest checkpoint that is damaged is refused; `choose` passes over it.

    Args:
        averaged: read the Polyak average of the weights instead of the weights.

    Raises:
        InputError: nothing there, no whole checkpoint, or tensors that are not the network's.
    """
    return read_weights(find_checkpoint(Path(path)), averaged=averaged)


def read_weights(saved: Checkpoint, *, averaged: bool = False) -> Weights:
    """The weights of a checkpoint, which must hold what it did when it was opened. Raises as `load_weights`."""
    spec = ViTSpec(**saved.state["model"])
    tensors = read_tensors(saved, tensor_shapes(spec), averaged=averaged)
    return Weights(spec, tensors, saved.step, saved.path, fingerprint(tensors), averaged, index_hash(saved))


def index_hash(saved: Checkpoint) -> str:
    """The hash of the index that a checkpoint was trained on; empty where it does not record it."""
    return str(saved.state.get("stream", {}).get("index_hash", ""))


def choose(path: str | Path) -> Checkpoint:
    """The checkpoint that WEIGHTS names, verified to the last hash: the one given, or the newest of a run folder.

    Collective, with the same result on every rank: while a run is under way, or where a file system lags, one rank
    would see a newer checkpoint than another. Newer checkpoints that are damaged are passed over, with a message.

    Raises:
        InputError: there is none; names what was looked for, on every rank.
    """
    path = Path(path)
    checkpoint, folder = on_main(lambda: _classify(path))
    if checkpoint is not None:
        return checkpoints.read_verified(checkpoint)
    saved, passed_over = checkpoints.newest_verified(folder)
    found = _found(path, folder, saved, passed_over)
    for fault in passed_over.values() if is_main() else ():
        say(f"weights {path}: passed over: {fault}")
    return found


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that WEIGHTS names, by the sizes of its files; `choose` verifies hashes too. Not collective.

    Raises:
        InputError: there is none; names what was looked for.
    """
    checkpoint, folder = _classify(path)
    return Checkpoint.read(checkpoint) if checkpoint is not None else _found(path, folder, *checkpoints.newest(folder))


def _classify(path: Path) -> tuple[Path | None, Path]:
    """The one checkpoint that WEIGHTS names, itself or by `latest` or `best`; else None. And the folder of others."""
    if not files.exists(path):
        raise InputError(f"weights {path}: no such file or folder; give a run folder or a checkpoint inside one")
    if checkpoints.is_pointer(path):
        path = checkpoints.named_by(path)
    if not files.is_folder(path):
        raise InputError(
            f"weights {path}: a file, and weights are read from folders only, not yet from files of any format; give a "
            "run folder or a checkpoint inside one"
        )
    is_checkpoint = checkpoints.is_checkpoint_name(path) or files.is_file(path / STATE)
    return path if is_checkpoint else None, path if path.name == "checkpoints" else path / "checkpoints"


def _found(path: Path, folder: Path, saved: Checkpoint | None, passed_over: dict[Path, str]) -> Checkpoint:
    if saved is None:
        damaged = "".join(f"; {fault}" for fault in passed_over.values())
        raise InputError(
            f"weights {path}: no whole checkpoint under {folder}{damaged}; give a run folder that has trained, "
            "or a checkpoint inside one"
        )
    return saved


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 over every tensor's name, shape and fp32 little-endian values, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].float().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
