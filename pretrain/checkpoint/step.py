"""The folder of one checkpoint: its state, and the sizes and hashes that tell damage.

step_00001000/
  state.json                      step, stream position, config, network; sizes and hashes of the files beside it
  layout.json                     which pieces of which parameters each rank's files hold
  weights.00000.safetensors       rank 0's pieces of the fp32 weights
  average.00000.safetensors       … of their Polyak average, where one is kept
  optimizer.00000.safetensors     … of the optimizer's states
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.errors import InputError
from pretrain.files import ABSENT, patiently
from pretrain.progress import Progress
from pretrain.ranks.collectives import is_main

FORMAT = 2
STATE, LAYOUT = "state.json", "layout.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files are all there, each with the size that was written."""

    path: Path
    step: int  # steps completed
    state: dict[str, Any]  # what state.json holds, without the seal

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """The checkpoint in the folder `path`.

        Raises:
            InputError: no whole checkpoint: no `state.json`, or a file is missing or of another size than was written.
            StorageError: storage does not serve it for now.
            OSError: it may not be read.
        """
        try:
            state = json.loads(patiently(path / STATE, partial((path / STATE).read_text, encoding="utf-8")))
        except ABSENT:
            raise InputError(f"checkpoint {path}: no {STATE}, so it is no whole checkpoint") from None
        except ValueError as error:
            raise InputError(f"checkpoint {path}: {STATE} cannot be read: {error}") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            found = state.get("format") if isinstance(state, dict) else state
            raise InputError(f"checkpoint {path}: format {found!r}, this version reads {FORMAT}")
        if state.pop("seal", None) != seal(state):
            raise InputError(f"checkpoint {path}: damaged: {STATE} is not what was written")
        for name, written in state["files"].items():
            found = patiently(path / name, partial(_size, path / name))
            if found != written["bytes"]:
                what = "is missing" if found is None else f"has {found} bytes"
                raise InputError(f"checkpoint {path}: damaged: {name} {what}, {written['bytes']} bytes were written")
        return cls(path, state["step"], state)

    @property
    def bytes(self) -> int:
        """The size of all files that hold its values."""
        return sum(file["bytes"] for file in self.state["files"].values())

    @property
    def sha256(self) -> str:
        """A hash of all its content: the hashes of its files are part of its state."""
        return seal(self.state)

    def verify(self, names: Iterable[str] | None = None, advance: Callable[[int], None] = lambda count: None) -> None:
        """Compare the files `names` (None: all) with the hashes taken when they were written.

        Args:
            names: of files in its folder.
            advance: is told how many more bytes have been read.

        Raises:
            InputError: naming the first file that differs.
            StorageError: storage does not serve it for now.
            OSError: it may not be read.
        """
        for name in self.state["files"] if names is None else names:
            written = self.state["files"][name]["sha256"]
            try:
                found = patiently(self.path / name, partial(files.sha256, self.path / name, advance))
            except ABSENT:
                raise InputError(f"checkpoint {self.path}: damaged: {name} is missing") from None
            if found != written:
                raise InputError(
                    f"checkpoint {self.path}: damaged: {name} has sha256 {found[:12]}…, {written[:12]}… was written"
                )

    def verify_with_progress(self, names: Sequence[str]) -> None:
        """As `verify`; rank 0 shows its progress, as gigabytes are read."""
        size = sum(self.state["files"][name]["bytes"] for name in names)
        with Progress(f"checking {self.path.name}", "bytes", size) as progress:
            self.verify(names, progress.advance if is_main() else lambda count: None)


def seal(state: dict[str, Any]) -> str:
    """The hash that shows damage to `state.json` itself, which holds the hashes of all other files."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int | None:
    """Its bytes; None where no such file is there."""
    try:
        found = path.stat()
    except ABSENT:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
