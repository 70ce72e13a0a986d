"""Weights from wherever they are: a run folder or a checkpoint inside one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pretrain.engine import checkpoint
from pretrain.engine.distributed import share, together
from pretrain.engine.restore import read_whole
from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import tensor_shapes


@dataclass(frozen=True)
class Weights:
    """A network's parameters, whole, in fp32 on the CPU."""

    spec: ViTSpec
    tensors: dict[str, Tensor]
    step: int | None
    source: Path  # the checkpoint they were read from
    sha256: str  # of names, shapes and values: the same however many ranks wrote them
    averaged: bool = False  # the Polyak average

    def describe(self) -> str:
        """Where they are from, in a few words."""
        return f"{'averaged ' if self.averaged else ''}weights of {self.source}"


def load_weights(path: str | Path, *, averaged: bool = False) -> Weights:
    """Read WEIGHTS: a run folder (its newest whole checkpoint) or a checkpoint folder.

    averaged: read the Polyak average of the weights, not the weights.

    Raises:
        InputError: nothing there, no whole checkpoint, or tensors that are not the network's.
    """
    saved = find_checkpoint(Path(path))
    spec = ViTSpec(**saved.state["model"])
    tensors = read_whole(saved, tensor_shapes(spec), averaged=averaged)
    return Weights(spec, tensors, saved.step, saved.path, fingerprint(tensors), averaged)


def agreed(path: str | Path) -> Path:
    """The checkpoint that WEIGHTS names, the same on every rank. Collective.

    The run may be under way, or a file system lag: one rank would see a newer checkpoint than another. Rank 0's is
    taken. Raises InputError on every rank where one finds none.
    """
    return share(together(lambda: find_checkpoint(Path(path)).path))


def read_spec(path: str | Path) -> ViTSpec:
    """The network of WEIGHTS, without its tensors. Raises as `load_weights`."""
    return ViTSpec(**find_checkpoint(Path(path)).state["model"])


def find_checkpoint(path: Path) -> checkpoint.Saved:
    """The checkpoint that WEIGHTS names.

    Raises:
        InputError: there is none, with what was looked for.
    """
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise InputError(f"weights {path}: no such file or folder; give a run folder or a checkpoint inside one")
    if (path / checkpoint.STATE).is_file():
        return checkpoint.read(path)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    saved, passed_over = checkpoint.newest(folder)
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
