"""What a certificate says of one claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be known"
_SHOWN = 5  # faults of one kind that are written out


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it.

    Args:
        claim: what is promised.
        verdict: HOLDS, FAILS or UNKNOWN.
        words: of what it holds, or why it cannot be known.
        faults: each names file, line and step, what was found and what would be right; the first few.
    """

    claim: str
    verdict: str
    words: str
    faults: tuple[str, ...] = ()


def counted(count: int, noun: str) -> str:
    """A number of things: "1 line", "2,000 lines"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Faults:
    """Faults as they are found: the first few in words, all counted."""

    def __init__(self) -> None:
        self.count = 0
        self._texts: list[str] = []

    def add(self, text: str) -> None:
        """Note one."""
        self.count += 1
        if len(self._texts) < _SHOWN:
            self._texts.append(text)

    @property
    def texts(self) -> tuple[str, ...]:
        """The first ones, and how many follow."""
        more = self.count - len(self._texts)
        return (*self._texts, *([f"and {more:,} more"] if more else []))

    def finding(self, claim: str, words: str, unknown: Sequence[str] = ()) -> Finding:
        """The claim holds, in these words, unless there are faults or something that cannot be known."""
        verdict = FAILS if self.count else UNKNOWN if unknown else HOLDS
        return Finding(claim, verdict, "; ".join([words, *unknown]) if words else "; ".join(unknown), self.texts)
