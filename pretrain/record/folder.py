"""The run folder: its paths, the config record, and files of lines that always tell one history."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.errors import InputError
from pretrain.record.lines import CHECK
from pretrain.storage.location import local_path

CONFIG, METRICS, QUARANTINE, EVENTS = "config.json", "metrics.jsonl", "quarantine.jsonl", "events.jsonl"
CLAIM = ".claim"  # locked while a run is under way
CHECKPOINTS, AUDIT, TENSORBOARD, INSPECTION = "checkpoints", "audit", "tensorboard", "inspection"


class RunFolder:
    """Paths of a run, its config record, and its append-only files."""

    def __init__(self, path: Path) -> None:
        self.path = path = local_path(path)
        self.checkpoints = path / CHECKPOINTS
        self.tensorboard = path / TENSORBOARD
        self.metrics, self.quarantine = path / METRICS, path / QUARANTINE
        self.events = path / EVENTS
        self.inspection = path / INSPECTION

    def create(self) -> None:
        """Make the folder and that of its checkpoints, if they do not exist.

        Raises:
            OSError: one cannot be made or written to. Better now than with the first save.
        """
        files.make_folder(self.path)
        files.make_folder(self.checkpoints)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.json`: the resolved config, with versions, commit and command line."""
        record = {**config, "versions": versions(), "git_commit": git_commit(), "command": sys.argv}
        files.write_text(self.path / CONFIG, json.dumps(record, indent=2) + "\n")

    def rewind(self, step: int, rank: int = 0, ranks: int = 1) -> None:
        """Make the files those of a run that has completed `step` steps; each rank does a part of them.

        Lines of later steps move to `*.discarded.jsonl`, a torn last line is dropped.
        """
        if rank == 0:
            _rewind(self.metrics, lambda line: line["step"] <= step)
            _rewind(self.quarantine, lambda line: line["step"] < step)
        names = sorted(os.listdir(self.path / AUDIT)) if files.exists(self.path / AUDIT) else []
        audits = [name for name in names if re.fullmatch(r"rank_\d+\.jsonl", name)]
        for name in audits[rank::ranks]:
            _rewind(self.path / AUDIT / name, lambda line: line["step"] < step)

    def mend_events(self) -> None:
        """Drop a torn last line of `events.jsonl`, which takes no line back otherwise."""
        _rewind(self.events, lambda line: True)

    def sync(self, rank: int) -> None:
        """Flush the files to the disk: this rank's audit and, on rank 0, the common ones."""
        common = [self.metrics, self.quarantine, self.events] if rank == 0 else []
        for file in (*common, self.audit(rank)):
            if files.exists(file):
                files.flush(file)

    def audit(self, rank: int) -> Path:
        """The file of the samples that a rank trained on."""
        return self.path / AUDIT / f"rank_{rank:05d}.jsonl"

    def last_scores(self) -> dict[str, Any]:
        """The values of the last evaluation in `metrics.jsonl`, by name; empty where there is none."""
        if not files.exists(self.metrics):
            return {}
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        found = [line for line in lines if '"loss": ' not in line and line.endswith("\n")]  # as `evaluated`
        return scores_in(json.loads(found[-1])) if found else {}

    def evaluated(self, step: int) -> bool:
        """Whether `metrics.jsonl` has an evaluation after `step` steps: its only lines without a loss."""
        if not files.exists(self.metrics):
            return False
        with self.metrics.open(encoding="utf-8") as file:
            # The last line may be torn; only those of the step are parsed.
            lines = (line for line in file if line.startswith(f'{{"step": {step},') and line.endswith("\n"))
            return any("loss" not in json.loads(line) for line in lines)

    def scores(self, name: str) -> Iterator[tuple[int, float]]:
        """Steps and values of a score in the evaluations of `metrics.jsonl`, in their order; NaN is left out."""
        if not files.exists(self.metrics):
            return
        with self.metrics.open(encoding="utf-8") as file:
            for line in file:
                if f'"{name}": ' in line and line.endswith("\n"):  # the last line may be torn
                    found = json.loads(line)
                    if found[name] is not None:
                        yield found["step"], found[name]


def scores_in(line: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation found, by name: its line in `metrics.jsonl` without what every line has."""
    besides = ("step", "at", CHECK)
    return {name: value for name, value in line.items() if name not in besides and not name.startswith("time/")}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that training depends on."""
    packages = ("torch", "torchvision", "deepspeed", "webdataset", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def git_commit() -> str | None:
    """The commit of the code, with "-dirty" where it has been changed since; None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        answers = [
            subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0] + ("-dirty" if answers[1] else "")


def _rewind(path: Path, stays: Callable[[dict[str, Any]], bool]) -> None:
    if not files.exists(path):
        return
    kept: list[str] = []
    discarded: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8: {error.reason}; mend or remove its line") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # torn by a kill in the middle of a write
    for number, line in enumerate(lines, start=1):
        try:
            (kept if stays(json.loads(line)) else discarded).append(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number} is no JSON: {error.msg}; mend or remove that line") from None
        except (KeyError, TypeError):
            raise InputError(f"{path}: line {number} tells no step; mend or remove that line") from None
    if discarded:
        aside = path.with_name(f"{path.stem}.discarded.jsonl")
        with files.naming(aside):
            before, text = aside.read_text(encoding="utf-8") if files.exists(aside) else "", "".join(discarded)
            if not before.endswith(text):  # a start that was killed before the next line had done as much
                files.write_text(aside, before + text)
    files.write_text(path, "".join(kept))
