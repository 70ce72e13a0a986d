"""Results: medians with their spread on the console, every figure as JSON under runs/bench/."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

OUT = Path("runs/bench")
_PACKAGES = ("torch", "torchvision", "webdataset", "pillow", "simplejpeg", "numpy", "timm", "transformers",
             "vit-pytorch", "deepspeed", "mosaicml-streaming")  # fmt: skip


def spread(values: Sequence[float], form: str = ".0f") -> tuple[str, str]:
    """Median, and lowest – highest."""
    return f"{statistics.median(values):{form}}", f"{min(values):{form}} – {max(values):{form}}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> None:
    """The first `names` columns stand left, the others right, under the command that made the figures."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}\n$ {command()}")
    for row in (header, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:names], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[names:], widths[names:], strict=True)]
        print("  ".join(cells).rstrip())


def save(name: str, results: dict[str, object]) -> None:
    """Write runs/bench/NAME.json: the results, the command, the machine and the versions."""
    OUT.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version()}
    versions = {package: version for package in _PACKAGES if (version := _version(package))}
    path = OUT / f"{name}.json"
    path.write_text(json.dumps({"command": command(), **machine, "versions": versions, **results}, indent=1) + "\n")
    print(f"\n{path}")


def command() -> str:
    """The command line as one types it."""
    script = Path(sys.argv[0])
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
