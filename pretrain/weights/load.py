"""Weights from wherever they are: a run folder or a checkpoint inside one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pretrain import files
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.pieces import read_tensors
from pretrain.checkpoint.step import STATE, Checkpoint
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import tensor_shapes
from pretrain.ranks.collectives import is_main, on_main


@dataclass(frozen=True)
class Weights:
    """A network's parameters, whole, in fp32 on the CPU."""

    spec: ViTSpec
    tensors: dict[str, Tensor]
    step: int | None
    source: Path  # the checkpoint they were read from
    sha256: str  # of names, shapes and values: the same however many ranks wrote them
    averaged: bool = False  # the Polyak average
    trained_on: str = ""  # the hash of the index; empty where the checkpoint does not say


def load_weights(path: str | Path, *, averaged: bool = False) -> Weights:
    """Read WEIGHTS: a checkpoint, or the newest of a run folder. `choose` passes over one that is damaged.

    averaged: read the Polyak average of the weights, not the weights.

    Raises:
        InputError: nothing there, no whole checkpoint, or tensors that are not the network's.
    """
    return read_weights(find_checkpoint(Path(path)), averaged=averaged)


def read_weights(saved: Checkpoint, *, averaged: bool = False) -> Weights:
    """The weights of a checkpoint, which must hold what it did when it was opened. Raises as `load_weights`."""
    spec = ViTSpec(**saved.state["model"])
    tensors = read_tensors(saved, tensor_shapes(spec), averaged=averaged)
    trained_on = saved.state.get("stream", {}).get("index_hash", "")
    return Weights(spec, tensors, saved.step, saved.path, fingerprint(tensors), averaged, trained_on)


def choose(path: str | Path) -> Checkpoint:
    """The checkpoint that WEIGHTS names, whole to the last hash: the one given, or the newest of a run folder.

    Collective, and the same on every rank: the run may be under way, or a file system lag, and one rank would see a
    newer checkpoint than another. Newer ones that are damaged are passed over, and said.

    Raises:
        InputError: there is none, with what was looked for; on every rank.
    """
    path = Path(path)
    one, folder = on_main(lambda: _place(path))
    if one:
        return checkpoints.read_verified(path)
    saved, passed_over = checkpoints.newest_verified(folder)
    found = _found(path, folder, saved, passed_over)
    for fault in passed_over.values() if is_main() else ():
        say(f"weights {path}: passed over: {fault}")
    return found


def agreed(path: str | Path) -> Path:
    """Where the checkpoint stands that WEIGHTS names, as `choose` does."""
    return choose(path).path


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that WEIGHTS names, by the sizes of its files; `choose` looks at the hashes too. Not collective.

    Raises:
        InputError: there is none, with what was looked for.
    """
    one, folder = _place(path)
    return Checkpoint.read(path) if one else _found(path, folder, *checkpoints.newest(folder))


def _place(path: Path) -> tuple[bool, Path]:
    """Whether WEIGHTS names one checkpoint, and otherwise the folder of those it names."""
    if not files.exists(path):
        raise InputError(f"weights {path}: no such file or folder; give a run folder or a checkpoint inside one")
    if not files.is_folder(path):
        raise InputError(
            f"weights {path}: a file, and weights are read from folders only, not yet from files of any format; give a "
            "run folder or a checkpoint inside one"
        )
    one = checkpoints.is_checkpoint_name(path) or files.is_file(path / STATE)
    return one, path if path.name == "checkpoints" else path / "checkpoints"


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
