"""Several runs side by side: what tells them apart, and the axis that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pretrain.errors import InputError
from pretrain.history.history import RunHistory
from pretrain.history.hours import Hours, hours
from pretrain.page.text import shortened

_COLOURS = 8  # of a chart, light or dark
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Style:
    """How a run is drawn, in all charts alike: runs differ in the kind of line and marker as well as in colour."""

    label: str
    colour: str
    line: str
    marker: str


@dataclass(frozen=True)
class Overlay:
    """Runs, what they are called, and where their time went, in the order given."""

    runs: Sequence[RunHistory]
    labels: Sequence[str]
    hours: Sequence[Hours]

    @classmethod
    def of(cls, runs: Sequence[RunHistory]) -> Overlay:
        """Raises InputError where a run is given twice."""
        folders = Counter(run.folder.path.resolve() for run in runs)
        twice = [str(folder) for folder, count in folders.items() if count > 1]
        if twice:
            raise InputError(f"RUN {twice[0]}: given twice; each run once would be right")
        return cls(runs, labels(runs), [hours(run) for run in runs])

    def styles(self) -> list[Style]:
        """One for each run."""
        return [
            Style(
                shortened(label, 40),
                f"C{number % _COLOURS}",
                _LINES[number % len(_LINES)],
                _MARKERS[number % len(_MARKERS)],
            )
            for number, label in enumerate(self.labels)
        ]

    @property
    def by_images(self) -> bool:
        """Whether the axis counts images: a step of one run is not a step of another."""
        return len({run.global_batch for run in self.runs}) > 1

    def scale(self, run: RunHistory) -> int:
        """What a step of `run` is on the axis."""
        return run.global_batch if self.by_images else 1

    @property
    def axis(self) -> str:
        """The name of the axis."""
        return "images" if self.by_images else "step"

    @property
    def end(self) -> float:
        """Where the axis ends: what the longest run has come to."""
        return max(run.step * self.scale(run) for run in self.runs) or 1

    def differences(self) -> dict[str, list[str]]:
        """Keys of the configs whose values are not the same in all runs, with each run's value."""
        configs = [flat(run.config) for run in self.runs]
        keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in _NO_KEYS]
        values = {key: [config.get(key, "–") for config in configs] for key in keys}
        return {key: of_runs for key, of_runs in values.items() if len(set(of_runs)) > 1}


_NO_KEYS = ("command", "git_commit")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The values of a config as text, by dotted keys."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _text(value)
    return found


def _text(value: Any) -> str:
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case list():
            return ", ".join(map(_text, value))
        case _:
            return f"{value:g}" if isinstance(value, float) else str(value)


def labels(runs: Sequence[RunHistory]) -> list[str]:
    """The name of each run; of runs whose names are equal, first so much of the folder as tells them apart."""
    names = Counter(run.name for run in runs)
    paths = [PurePath(run.folder.path.resolve()) for run in runs]
    return [
        run.name if names[run.name] == 1 else f"{_tail(path, paths)} ({run.name})"
        for run, path in zip(runs, paths, strict=True)
    ]


def _tail(path: PurePath, paths: Sequence[PurePath]) -> str:
    """The shortest end of a path that is no other's."""
    for parts in range(1, len(path.parts)):
        tail = path.parts[-parts:]
        if sum(other.parts[-parts:] == tail for other in paths) == 1:
            return "/".join(tail)
    return str(path)
