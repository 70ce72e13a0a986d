"""The run folder: what a run writes down beside its checkpoints, so that the files always tell one history."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pretrain.engine.checkpoint import flush
from pretrain.errors import InputError
from pretrain.stream.location import local_path

CONFIG, METRICS, QUARANTINE = "config.json", "metrics.jsonl", "quarantine.jsonl"
CHECKPOINTS, AUDIT, TENSORBOARD, INSPECTION = "checkpoints", "audit", "tensorboard", "inspection"


class RunFolder:
    """Paths of a run, its config record, and its append-only files."""

    def __init__(self, path: Path) -> None:
        self.path = path = local_path(path)
        self.checkpoints = path / CHECKPOINTS
        self.tensorboard = path / TENSORBOARD
        self.metrics, self.quarantine = path / METRICS, path / QUARANTINE
        self.inspection = path / INSPECTION

    def create(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            InputError: it cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {self.path}: cannot be made: {error.strerror}; give a folder to write to"
            ) from None
        if not os.access(self.path, os.W_OK):
            raise InputError(f"--out {self.path}: cannot be written to; give a folder to write to")

    def write_config(self, config: dict[str, Any]) -> None:
        """`config.json`: the resolved config, with the versions and the commit it runs under."""
        record = {**config, "versions": versions(), "git_commit": git_commit(), "command": sys.argv}
        _replace(self.path / CONFIG, [json.dumps(record, indent=2) + "\n"])

    def rewind(self, step: int, rank: int = 0, ranks: int = 1) -> None:
        """Make the files those of a run that has completed `step` steps; the ranks divide them among themselves.

        Lines of later steps move to `*.discarded.jsonl`, a torn last line is dropped.
        """
        if rank == 0:
            _rewind(self.metrics, lambda line: line["step"] <= step)
            _rewind(self.quarantine, lambda line: line["step"] < step)
        audits = sorted(file for file in (self.path / AUDIT).glob("rank_*.jsonl") if file.name.count(".") == 1)
        for file in audits[rank::ranks]:
            _rewind(file, lambda line: line["step"] < step)

    def sync(self, rank: int) -> None:
        """Put on the disk what the files say up to now, rank 0 the common ones."""
        files = [self.metrics, self.quarantine] if rank == 0 else []
        for file in (*files, self.audit(rank)):
            if file.is_file():
                flush(file)

    def audit(self, rank: int) -> Path:
        """A rank's audit of the samples it trained on."""
        return self.path / AUDIT / f"rank_{rank:05d}.jsonl"

    def evaluated(self, step: int) -> bool:
        """Whether `metrics.jsonl` tells of an evaluation after `step` steps: its only lines without a step's loss."""
        if not self.metrics.is_file():
            return False
        with self.metrics.open(encoding="utf-8") as file:
            # The last line may be torn; of the others only those of the step are worth the parsing.
            lines = (line for line in file if line.startswith(f'{{"step": {step},') and line.endswith("\n"))
            return any("loss" not in json.loads(line) for line in lines)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that training rests on."""
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
    if not path.is_file():
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
        with path.with_name(f"{path.stem}.discarded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(discarded)
            file.flush()
            os.fsync(file.fileno())
    _replace(path, kept)


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write the file aside, flush it, rename it into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
