"""The files of a run folder, read back."""

from __future__ import annotations

import errno
import fcntl
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.errors import InputError
from pretrain.record.folder import CLAIM, CONFIG, RunFolder

Line = dict[str, Any]
_NAMED = 3  # runs in a folder that is none
_TOGETHER = 1000  # lines that are parsed at once
ENDS = ("finished", "stopped", "failed")
_SECTIONS = {"model", "data", "train", "optimizer", "schedule", "checkpoint", "logging", "network"}
# What is computed with: of these kinds, in every line that has it.
_NUMBER = (int, float)
_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "event": (str,),
    "ranks": (int,),
    "schedule": (dict,),
    "at": _NUMBER,
    "began": _NUMBER,
    "loss": (*_NUMBER, type(None)),  # null: it was no number
    **{f"time/{part}": _NUMBER for part in ("training", "waiting", "saving", "evaluating")},
}


@dataclass(frozen=True)
class Attempt:
    """One start of a run's command, and what followed until it ended or was killed.

    Args:
        start: its event `start`.
        events: all of its events, in their order.
        lines: the lines of training and evaluation that it wrote, in the order of their times, also those that a later
            start has taken back.
    """

    start: Line
    events: tuple[Line, ...]
    lines: tuple[Line, ...]

    @property
    def began(self) -> float:
        """When its process began, in seconds since 1970."""
        return float(self.start["began"])

    @property
    def last(self) -> float:
        """When it is last heard of, in seconds since 1970."""
        return max(float(line["at"]) for line in (*self.events, *self.lines[-1:]))

    @property
    def end(self) -> Line | None:
        """The event that it ended with; None of one that was killed, or is going on."""
        return self.events[-1] if self.events[-1]["event"] in ENDS else None


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder tells it.

    Args:
        config: as config.json holds it.
        lines: of metrics.jsonl, those of training steps; `step` is completed steps.
        evaluations: of metrics.jsonl, the others.
        discarded: lines of both kinds that a resume has taken back.
        events: of events.jsonl; empty of a run that was trained before there was one.
        quarantine: of quarantine.jsonl.
    """

    folder: RunFolder
    config: dict[str, Any]
    lines: tuple[Line, ...]
    evaluations: tuple[Line, ...]
    discarded: tuple[Line, ...]
    events: tuple[Line, ...]
    quarantine: tuple[Line, ...]

    @classmethod
    def read(cls, path: Path) -> RunHistory:
        """Read a run folder; the run may be going on, and the last line of a file be torn.

        Raises:
            InputError: no run folder, a line that is no JSON, or a value that a step, a time or a loss cannot be; names
                file and line.
        """
        folder = RunFolder(path)
        if not files.is_file(folder.path / CONFIG):
            what = f"no {CONFIG} in it" if files.is_folder(folder.path) else "no such folder"
            inside = [found.parent for deep in ("*", "*/*") for found in sorted(folder.path.glob(f"{deep}/{CONFIG}"))]
            runs = f", as {', '.join(map(str, inside[:_NAMED]))}" if inside else ""
            raise InputError(
                f"run {path}: {what}; the folder of a run (--out of a training command) would be right{runs}"
            )
        text = (folder.path / CONFIG).read_text(encoding="utf-8")
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{folder.path / CONFIG}: no JSON: {error}") from None
        if not isinstance(config, dict) or not ("name" in config and isinstance(config.get("train"), dict)):
            raise InputError(f"{folder.path / CONFIG}: not that of a run: it has no name, or no section train")
        for name in _SECTIONS & config.keys():
            if not isinstance(config[name], dict):
                raise InputError(f"{folder.path / CONFIG}: {name} is {config[name]!r}; a section would be right")
        metrics = read_lines(folder.metrics, "step")
        return cls(
            folder,
            config,
            tuple(line for line in metrics if "loss" in line),
            tuple(line for line in metrics if "loss" not in line),
            read_lines(folder.metrics.with_name(f"{folder.metrics.stem}.discarded.jsonl"), "step"),
            read_lines(folder.events, "at", "event", "step"),
            read_lines(folder.quarantine, "step"),
        )

    def require(self, *keys: str) -> None:
        """Raise InputError where the config lacks one of these dotted keys."""
        for key in keys:
            at: Any = self.config
            for name in key.split("."):
                if not isinstance(at, dict) or name not in at:
                    raise InputError(f"{self.folder.path / CONFIG}: no {key}; that of a run holds it")
                at = at[name]

    @property
    def name(self) -> str:
        """The run's name, as its config has it."""
        return str(self.config["name"])

    @property
    def steps(self) -> int:
        """The length of the whole run."""
        return int(self.config["train"]["steps"])

    @property
    def global_batch(self) -> int:
        """Images of a step."""
        return int(self.config["train"]["global_batch"])

    @property
    def step(self) -> int:
        """Completed steps, as far as they are written down."""
        return max((int(line["step"]) for line in (*self.lines[-1:], *self.events[-1:])), default=0)

    @property
    def under_way(self) -> bool:
        """Whether a process holds the folder's claim, now."""
        try:
            file = (self.folder.path / CLAIM).open("rb")
        except OSError:
            return False
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back with the file
            except OSError as error:
                return error.errno in (errno.EACCES, errno.EAGAIN)
        return False

    @cached_property
    def attempts(self) -> tuple[Attempt, ...]:
        """The starts of the run, in their order; empty where they were not recorded."""
        begins = [number for number, event in enumerate(self.events) if event["event"] == "start"]
        written = sorted(
            (line for line in (*self.lines, *self.evaluations, *self.discarded) if "at" in line),
            key=lambda line: float(line["at"]),
        )
        times = [float(line["at"]) for line in written]
        firsts = [bisect_left(times, float(self.events[begin]["at"])) for begin in begins]
        return tuple(
            Attempt(self.events[begin], self.events[begin:end], tuple(written[first:until]))
            for (begin, end), (first, until) in zip(
                pairwise([*begins, len(self.events)]), pairwise([*firsts, len(written)]), strict=True
            )
        )


def read_lines(path: Path, *needed: str) -> tuple[Line, ...]:
    """The lines of a JSON-lines file; empty where there is none. A last line that is torn is left out.

    Args:
        needed: keys that every line has.

    Raises:
        InputError: another line is no JSON object, lacks a key or has a value of another kind; names it.
    """
    if not files.exists(path):
        return ()
    with files.naming(path):
        raw: Sequence[bytes] = path.read_bytes().split(b"\n")[:-1]  # a torn line has no end
    found: list[Line] = []
    for begin in range(0, len(raw), _TOGETHER):
        part = raw[begin : begin + _TOGETHER]
        try:
            values = json.loads(b"[%b]" % b",".join(part))  # the keys are held once, not once a line
        except ValueError:
            values = []
        if len(values) != len(part) or not all(isinstance(value, dict) for value in values):
            values = [_parsed(path, number, line) for number, line in enumerate(part, start=begin + 1)]
        for number, line in enumerate(values, start=begin + 1):
            _check_kinds(path, number, line, needed)
        found += values
    return tuple(found)


def _check_kinds(path: Path, number: int, line: Line, needed: Sequence[str]) -> None:
    for key, kinds in _KINDS.items():
        if (key in line or key in needed) and type(line.get(key)) not in kinds:
            right = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise InputError(f"{path}: line {number}: {key} is {line.get(key)!r}; {right} would be right")


def _parsed(path: Path, number: int, line: bytes) -> Line:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: line {number} is no JSON object")
    return value
