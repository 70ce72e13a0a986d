"""WEIGHTS as commands name them: a run folder, a checkpoint inside one, or a file or folder of any format."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pretrain import files
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.pieces import read_tensors, weight_kind
from pretrain.checkpoint.step import STATE, Checkpoint
from pretrain.console import say
from pretrain.errors import FileSystemError, InputError, StorageError
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import tensor_shapes
from pretrain.ranks.collectives import is_main, on_main, require_same, together
from pretrain.ranks.launcher import local_rank
from pretrain.storage.store import is_remote
from pretrain.weights.download import Remote
from pretrain.weights.read import find_in_file
from pretrain.weights.tensorfile import INDEX
from pretrain.weights.weights import Weights, fingerprint

_STEPS = 8  # named in a message


class Source(Protocol):
    """WEIGHTS that were found, and whose network is known; their values are not read yet."""

    @property
    def path(self) -> Path:
        """The checkpoint, file or folder; of a URL its copy on this host."""
        ...

    @property
    def name(self) -> str:
        """What a run that begins from them records: a URL, or the absolute path."""
        ...

    @property
    def spec(self) -> ViTSpec:
        """Their network."""
        ...

    @property
    def step(self) -> int | None:
        """Steps of training; None where a file does not record it."""
        ...

    @property
    def sha256(self) -> str:
        """A hash of all the content of the checkpoint or file."""
        ...

    @property
    def trained_on(self) -> str:
        """The hash of the index that they were trained on; empty where it is not recorded."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of their run, resolved, or a part of it; empty where it is not recorded."""
        ...

    def check_kind(self, averaged: bool) -> None:
        """Raises InputError where the Polyak average is asked for and there is none."""
        ...

    def read(self, averaged: bool = False) -> Weights:
        """Read them. Not collective.

        Raises:
            InputError: damaged, not the network's, or there is no average.
        """
        ...


@dataclass(frozen=True)
class SavedSource:
    """WEIGHTS in a checkpoint."""

    saved: Checkpoint

    @property
    def path(self) -> Path:
        return self.saved.path

    @property
    def name(self) -> str:
        return os.path.abspath(self.path)

    @property
    def spec(self) -> ViTSpec:
        return ViTSpec.recorded(self.saved.state["model"])

    @property
    def step(self) -> int | None:
        return self.saved.step

    @property
    def sha256(self) -> str:
        return self.saved.sha256

    @property
    def trained_on(self) -> str:
        return str(self.saved.state.get("stream", {}).get("index_hash", ""))

    @property
    def config(self) -> Mapping[str, Any]:
        state = self.saved.state
        return state.get("config") or state.get("function") or {}  # the name that earlier versions gave it

    def check_kind(self, averaged: bool) -> None:
        weight_kind(self.saved, averaged=averaged)

    def read(self, averaged: bool = False) -> Weights:
        tensors = read_tensors(self.saved, tensor_shapes(self.spec), averaged=averaged)
        sha256, whole = fingerprint(tensors), sees_whole(self.config)
        return Weights(self.spec, tensors, self.step, self.path, sha256, averaged, self.trained_on, whole)


@dataclass(frozen=True)
class FileSource:
    """WEIGHTS in a file, or in a folder of one network."""

    path: Path
    name: str
    spec: ViTSpec
    sha256: str
    described: dict[str, Any]  # what an export says of itself
    pixels_told: bool  # whether it says how its images were normalised

    @classmethod
    def find(cls, path: Path, name: str = "") -> FileSource:
        """Tell the network of a file, and hash it. Raises InputError: it holds no known one."""
        found = find_in_file(path)
        for remark in (*found.file.notes.get("remarks", ()), *found.pixel_notes()):
            say(f"weights {name or path}: {remark}")
        return cls(
            path,
            name or os.path.abspath(path),
            found.spec,
            content_sha256(path),
            found.description,
            found.normalisation is not None,
        )

    @property
    def step(self) -> int | None:
        return self.described.get("step")

    @property
    def trained_on(self) -> str:
        return str(self.described.get("trained_on", ""))

    @property
    def config(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.described.get("config", {})
        return found

    @property
    def is_average(self) -> bool:
        """Whether they are the Polyak average of a run's weights, and nothing else."""
        return bool(self.described.get("weights") == "averaged")

    def check_kind(self, averaged: bool) -> None:
        if averaged and not self.is_average:
            raise InputError(
                f"weights {self.path}: holds one set of weights and does not say that they are averaged; leave out "
                "--weights averaged"
            )

    def read(self, averaged: bool = False) -> Weights:
        self.check_kind(averaged)
        tensors = find_in_file(self.path).read()
        sha256, whole = fingerprint(tensors), sees_whole(self.config)
        return Weights(self.spec, tensors, self.step, self.path, sha256, self.is_average, self.trained_on, whole)


def sees_whole(config: Mapping[str, Any]) -> bool:
    """Whether the run of a config, as a `Source` has it, evaluates whole images; centres where it says nothing."""
    return bool(config.get("data", {}).get("eval_crop") == "whole")


def content_sha256(path: Path) -> str:
    """A hash of a file, or of all files directly in a folder and their names."""
    if not path.is_dir():
        return files.sha256(path)
    names = sorted(name for name in os.listdir(path) if name.endswith((".json", ".safetensors")))
    text = "".join(f"{name} {files.sha256(path / name)}\n" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()


def load_weights(path: str | Path, *, averaged: bool = False) -> Weights:
    """Read WEIGHTS: a checkpoint, the newest one of a run folder, or a file or folder of any format. Not collective.

    A newest checkpoint that is damaged is refused; `choose` passes over it.

    Args:
        averaged: read the Polyak average of the weights instead of the weights.

    Raises:
        InputError: nothing there, no whole checkpoint, or tensors that are not the network's.
    """
    return find(path).read(averaged)


def choose(path: str | Path) -> Source:
    """What WEIGHTS names: a file or folder; or a checkpoint, the one given or a run's newest, all its hashes checked.

    Collective, with the same result on every rank: while a run is under way, or where a file system lags, one rank
    would see a newer checkpoint than another. Newer checkpoints that are damaged are passed over, with a message.

    Raises:
        InputError: there is none, or a node has another file there; names what was looked for, on every rank.
    """
    if is_remote(path):
        remote = on_main(lambda: Remote.find(str(path)))
        # Once on each host: the first of its ranks.
        together(lambda: remote.download() if local_rank(os.environ) == 0 else None)
        return replace(on_main(lambda: FileSource.find(remote.local, remote.url)), path=remote.local)
    path = Path(path)
    if on_main(lambda: _is_file(path)):
        source = on_main(lambda: FileSource.find(path))
        # Every node may have a copy of its own, and a stale one would be other weights: the first rank of each hashes.
        asked = not is_main() and local_rank(os.environ) == 0
        here = together(lambda: content_sha256(path) if asked and _is_file(path) else source.sha256)
        require_same(here, f"weights {path}: the content")
        return source
    checkpoint, folder = on_main(lambda: _classify(path))
    if checkpoint is not None:
        return SavedSource(checkpoints.read_verified(checkpoint))
    saved, passed_over = checkpoints.newest_verified(folder)
    found = _found(path, folder, saved, passed_over)
    for fault in passed_over.values() if is_main() else ():
        say(f"weights {path}: passed over: {fault}")
    return SavedSource(found)


def choose_every(path: str | Path, every: int) -> list[Source]:
    """The checkpoints of a run folder after a multiple of `every` steps, and its newest, by step; all hashes checked.

    Collective, with the same result on every rank. One that is damaged is refused: without it, what a report shows of
    a run would depend on which of its files are whole.

    Raises:
        InputError: no run folder; none of its checkpoints is at a multiple; some of those are damaged, all are named.
    """
    if every < 1:
        raise InputError(f"--every {every}: a number of steps, 1 or more, would be right")
    if is_remote(path) or on_main(lambda: _is_file(Path(path))):
        raise InputError(
            f"--every {every}: {path} is one set of weights; a run folder, for its checkpoints, would be right"
        )
    checkpoint, folder = on_main(lambda: _classify(Path(path)))
    if checkpoint is not None:
        raise InputError(f"--every {every}: {path} is one checkpoint; the run folder that holds it would be right")
    newest = choose(path)
    there = {checkpoints.step_of(one): one for one in reversed(checkpoints.list_on_main(folder))}
    chosen = {step: one for step, one in there.items() if step % every == 0}
    if not chosen:
        steps = ", ".join(map(str, there)) if len(there) < _STEPS else f"{min(there)} to {max(there)}"
        raise InputError(
            f"--every {every}: weights {path}: no checkpoint after a multiple of {every} steps; there are those of "
            f"{steps} steps. --every 1 takes all of them; a run keeps more than its newest with checkpoint.keep_every"
        )
    found: dict[int, Source] = {}
    faults = []
    for step, one in chosen.items():
        try:
            found[step] = newest if step == newest.step else SavedSource(checkpoints.read_verified(one))
        except (StorageError, FileSystemError):
            raise
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError(f"--every {every}: {'; '.join(faults)}. To leave a step out, move its folder away")
    if list(there) == [newest.step] and is_main():
        say(f"note: weights {path}: one checkpoint alone; a run keeps more with checkpoint.keep_every")
    return [*found.values(), *(() if newest.step in found else (newest,))]


def find(path: str | Path) -> Source:
    """What WEIGHTS names; of a checkpoint the sizes of files are checked, by `choose` hashes too. Not collective.

    Raises:
        InputError: there is none; names what was looked for.
    """
    if is_remote(path):
        remote = Remote.find(str(path))
        remote.download()
        return FileSource.find(remote.local, remote.url)
    path = Path(path)
    if _is_file(path):
        return FileSource.find(path)
    checkpoint, folder = _classify(path)
    if checkpoint is not None:
        return SavedSource(Checkpoint.read(checkpoint))
    return SavedSource(_found(path, folder, *checkpoints.newest(folder)))


def _is_file(path: Path) -> bool:
    """Whether WEIGHTS names a file, or a folder that holds one network's file, rather than a run or a checkpoint."""
    if not files.exists(path):
        raise InputError(
            f"weights {path}: no such file or folder; give a run folder, a checkpoint inside one, or a file of weights"
        )
    if files.is_folder(path):
        return files.is_file(path / "model.safetensors") or files.is_file(path / INDEX)
    return not checkpoints.is_pointer(path)


def _classify(path: Path) -> tuple[Path | None, Path]:
    """The one checkpoint that WEIGHTS names, itself or by `latest` or `best`; else None. And the folder of others."""
    if checkpoints.is_pointer(path):
        path = checkpoints.named_by(path)
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
