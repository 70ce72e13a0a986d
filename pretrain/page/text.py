"""Text and numbers as they are shown: in HTML, Markdown, a terminal's table or a figure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from pretrain.console import printable

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
    return text if len(text) <= letters else text[: letters - 1].rstrip() + "…"


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
        rows = [[printable(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = [str.ljust if column < self.names else str.rjust for column in range(len(widths))]
        return [
            "  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip()
            for row in rows
        ]
