"""The checkpoints in a run's folder, as they describe themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.record.folder import RunFolder

# As `checkpoint.folder` and `checkpoint.step` write them. These are not imported: with them would come torch.
_FOLDERS, _STATE, _POINTERS = "step_*", "state.json", ("latest", "best")


@dataclass(frozen=True)
class Saved:
    """A checkpoint as its state.json tells. Whether its files are whole is not looked at.

    Args:
        named: of `latest` and `best`, those that name it.
        written: in seconds since 1970.
        state: what state.json holds.
    """

    path: Path
    named: tuple[str, ...]
    written: float
    state: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file["bytes"] for file in self.state["files"].values())


def saved_checkpoints(folder: RunFolder) -> list[Saved]:
    """Those under `folder` whose state can be read, the newest first; one may be removed while this looks."""
    names = {pointer: _read(folder.checkpoints / pointer).strip() for pointer in _POINTERS}
    found = []
    for path in sorted(folder.checkpoints.glob(_FOLDERS), key=lambda path: path.name, reverse=True):
        try:
            state = json.loads(_read(path / _STATE))
            written = (path / _STATE).stat().st_mtime
        except (OSError, ValueError):
            continue
        named = tuple(pointer for pointer, name in names.items() if name == path.name)
        found.append(Saved(path, named, written, state))
    return found


def _read(path: Path) -> str:
    """The text of a file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
