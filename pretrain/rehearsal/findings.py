"""What a rehearsal found: a row for each part, the verdict on them all, and where it is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain import files
from pretrain.page.text import Table, duration_text

REPORT, PAGE = "rehearsal.json", "rehearsal.html"
SCRATCH = "scratch"  # beside them: the folder of the rehearsed run


@dataclass(frozen=True)
class Finding:
    """What a part of the rehearsal has seen, what the run needs, and how to mend it where that is not met.

    verdict: "ok"; "fails", where the real run would; "note", what no run fails for but its owner should know;
        "not run", where the run has no such part, or an earlier part that failed is needed for it.
    """

    part: str
    seen: str
    needed: str
    verdict: Literal["ok", "fails", "note", "not run"]
    change: str = ""


@dataclass(frozen=True)
class Report:
    """The findings of a rehearsal."""

    name: str  # of the run that was rehearsed
    ranks: int
    hosts: int
    device: str
    seconds: float
    findings: Sequence[Finding]
    measured: dict[str, Any]  # the figures behind them

    @property
    def failing(self) -> list[Finding]:
        """Those for which the real run would fail."""
        return [found for found in self.findings if found.verdict == "fails"]

    @property
    def verdict(self) -> str:
        """One sentence on them all."""
        if not self.failing:
            return f"{self.name} would run: nothing was found that it would fail for"
        return f"{self.name} would fail: {', '.join(found.part for found in self.failing)}"

    @property
    def title(self) -> str:
        """What was rehearsed, on what, and how long it took."""
        ranks, hosts = (f"{n} {what}{'s' * (n > 1)}" for n, what in ((self.ranks, "rank"), (self.hosts, "host")))
        return f"{self.name} on {ranks}, {hosts} ({self.device}), rehearsed in {duration_text(self.seconds)}"

    def table(self) -> Table:
        """The findings, a row each."""
        rows = [(found.part, found.seen, found.needed, found.verdict) for found in self.findings]
        return Table(("part", "seen", "needed", "verdict"), rows, names=4)

    def changes(self) -> list[str]:
        """What to change, for each finding that says so."""
        return [f"{found.part}: {found.change}" for found in self.findings if found.change]

    def text(self) -> str:
        """The table, what to change, and the verdict, for a console."""
        return "\n".join([self.title, *self.table().text(), *self.changes(), f"verdict: {self.verdict}"])

    def write(self, folder: Path) -> list[Path]:
        """Write the report as JSON and as a page, and return their paths. Raises OSError."""
        from pretrain.page.page import Page  # here, as it brings matplotlib

        record = {
            **{name: value for name, value in vars(self).items() if name != "findings"},
            "verdict": self.verdict,
            "fails": [found.part for found in self.failing],
            "findings": [asdict(found) for found in self.findings],
        }
        files.write_text(folder / REPORT, json.dumps(record, indent=1) + "\n")
        page = Page(f"Rehearsal of {self.name}")
        page.notes([f"{self.verdict}."], warning=bool(self.failing))
        page.table(self.table())
        page.notes([*(f"{change}." for change in self.changes()), f"{self.title}."])
        page.write(folder / PAGE)
        return [folder / REPORT, folder / PAGE]
