"""Text and numbers as they are shown: in HTML, Markdown, a terminal's table or a figure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from pretrain.console import END, ISOLATE, isolated, printable

# What Markdown would read as markup; "_" only where it is not within a word.
_MARKUP = re.compile(r"[\\`*\[\]<>|&$~]|(?<!\w)_|_(?!\w)")


def html_text(text: object) -> Markup:
    """Text as it shows in HTML and within an attribute's quotes. What is `Markup` already stays as it is."""
    return text if isinstance(text, Markup) else escape(printable(str(text)))


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def shortened(text: str, letters: int) -> str:
    """One printable line of at most `letters` letters; a longer text ends in an ellipsis."""
    text = printable(text)
    if len(text) <= letters:
        return text
    cut = text[: letters - 1].rstrip() + "…"
    return cut + END * (cut.count(ISOLATE) - cut.count(END))  # an isolated name that was cut ends with the text


def sentence(words: str) -> str:
    """ "three files" -> "Three files."."""
    return f"{words[0].upper()}{words[1:]}."


def byte_unit(count: float) -> tuple[float, str]:
    """The unit in which to tell a number of bytes: (bytes per unit, name)."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return scale, unit
    return 1.0, "B"


def bytes_text(count: float) -> str:
    """4608 -> "4.61 kB"."""
    scale, unit = byte_unit(count)
    return f"{count / scale:.0f} {unit}" if count >= 99.5 * scale else f"{count / scale:.3g} {unit}"


def number_text(value: float) -> str:
    """A number as a person says it: three digits, however small; whole from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration_text(seconds: float) -> str:
    """Seconds as a person says them: 42s, 3m05s, 7h12m, 3d04h."""
    whole = round(seconds)
    for unit, below, name, lower in ((86400, 3600, "d", "h"), (3600, 60, "h", "m"), (60, 1, "m", "s")):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // below:02d}{lower}"
    return f"{whole}s"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header. The first `names` columns are names, aligned left; the others are figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    names: int = 1

    def markdown(self) -> list[str]:
        """The lines of a Markdown table, without the caption."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(map(markdown_text, cells)) + " |"

        return [line(self.header), "|" + "---|" * len(self.header), *map(line, self.rows)]

    def text(self) -> list[str]:
        """The lines of a table for a terminal, without the caption; columns are two spaces apart."""
        rows = [[isolated(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(map(self._padded, row, widths, range(len(widths)))).rstrip() for row in rows]

    def _padded(self, cell: str, width: int, column: int) -> str:
        spaces = " " * (width - _columns(cell))
        return cell + spaces if column < self.names else spaces + cell


def _columns(text: str) -> int:
    """The columns of a terminal that a printable text takes: two for a wide letter, none for a mark or a joiner."""
    drawn = [letter for letter in text if unicodedata.category(letter) not in ("Mn", "Me", "Cf")]
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in drawn)
