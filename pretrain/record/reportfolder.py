"""The folder of a report: checked before there is anything to lose; another report that it holds is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.storage.location import local_path

REPORT = "report.json"
# What another start of the same command changes in a report.
_PASSING = ("seconds", "run", "versions", "git_commit")


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be made or written to, before what would be lost with it is computed."""
    new = not os.path.lexists(out)
    files.make_folder(local_path(out))
    if new:
        out.rmdir()  # a fault found later leaves none behind


def json_text(report: Mapping[str, Any]) -> str:
    """A report as its file holds it. Raises ValueError for numbers that are not finite."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def set_aside(report: Mapping[str, Any], folder: Path) -> Path | None:
    """Rename a `folder` that holds another report to folder-1, folder-2, …, and return where it lies now.

    Returns None where there is none, or the same report from an earlier start.
    """
    if not os.path.lexists(folder) or _read(folder / REPORT) == _reproducible(json.loads(json_text(report))):
        return None
    names = (folder.with_name(f"{folder.name}-{number}") for number in count(1))
    other = next(path for path in names if not os.path.lexists(path))
    os.rename(folder, other)
    return other


def write_parts(folder: Path, parts: Mapping[str, bytes]) -> None:
    """Write the files of a report, by name, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in parts.items():
        with files.atomic_write(folder / name) as file:
            file.write(data)


def _read(path: Path) -> dict[str, Any] | None:
    """The reproducible part of the report in a file; None where it holds no report."""
    try:
        return _reproducible(json.loads(path.read_bytes()))
    except (OSError, ValueError, AttributeError):
        return None


def _reproducible(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what another start of the same command changes."""
    return {key: value for key, value in report.items() if key not in _PASSING}
