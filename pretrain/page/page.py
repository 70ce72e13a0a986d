"""The page: cards, notes, tables, charts and pictures, rendered into one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from pretrain import files
from pretrain.errors import InputError
from pretrain.page.figure import DARK_PAPER, draw_png
from pretrain.page.text import Table, html_text

_WIDTH, _GAP = 12.8, 0.2  # inches of a page, and between its halves
_HEIGHT = 3.6  # inches of a chart
_PAIR = 2  # pictures of a group that needs little room
THUMBNAIL = 160  # pixels, the longer side of a picture; smaller images stay as they are


@dataclass(frozen=True)
class Chart:
    """A figure that `draw` fills; `text` says in words what it shows. A chart takes half the width of the page; with a
    `height` in inches of its own, the whole width.
    """

    text: str
    draw: Callable[[Figure], None]
    height: float | None = None


@dataclass(frozen=True)
class Picture:
    """An image of at most `THUMBNAIL` pixels a side with a caption of two lines; without an image, `fault` says why.

    A smaller one is enlarged pixel by pixel and stored without loss.
    """

    caption: str
    detail: str
    image: Image.Image | None
    fault: str = ""

    @property
    def small(self) -> bool:
        return self.image is not None and max(self.image.size) < THUMBNAIL

    def url(self) -> str:
        """The image as a data URL; empty without one."""
        if self.image is None:
            return ""
        data, kind = io.BytesIO(), "png" if self.small else "jpeg"
        self.image.save(data, kind, quality=88)
        return data_url(data.getvalue(), kind)


@dataclass(frozen=True)
class Group:
    """Pictures side by side, under what they have in common: `title`, and `detail` in small print. The first
    `marked` of them are set off from the others.
    """

    title: str
    detail: str
    pictures: Sequence[Picture]
    marked: int = 0


@dataclass(frozen=True)
class _Cell:
    """What a cell of the grid shows: tables, or a chart as two data URLs, for the light and the dark page."""

    wide: bool
    tables: Sequence[Table] = ()
    text: str = ""
    light: str = ""
    dark: str = ""


class Page:
    """Blocks one below the other. Text is escaped; what it holds of markup or control characters is shown."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._blocks: list[tuple[str, Any]] = []

    def heading(self, text: str) -> None:
        """The title of what follows."""
        self._blocks.append(("heading", text))

    def notes(self, sentences: Iterable[str], *, warning: bool = False) -> None:
        """Sentences in small print, a paragraph each."""
        self._blocks.append(("warnings" if warning else "notes", list(sentences)))

    def cards(self, figures: Mapping[str, str]) -> None:
        """The figures that come first: what they count -> figure."""
        self._blocks.append(("cards", figures))

    def table(self, table: Table) -> None:
        """A table over the whole width."""
        self._blocks.append(("table", table))

    def grid(self, parts: Sequence[Chart | Sequence[Table]]) -> None:
        """Charts and groups of tables: wide ones first, the others in pairs; one that is left over is wide too."""
        wide = [part for part in parts if isinstance(part, Chart) and part.height]
        halves = [part for part in parts if part not in wide]
        left_over = halves[len(halves) // 2 * 2 :]
        cells = [_cell(part, wide=part in wide or part in left_over) for part in (*wide, *halves)]
        self._blocks.append(("grid", cells))

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Squares, eight in a row."""
        self._blocks.append(("pictures", pictures))

    def groups(self, groups: Sequence[Group]) -> None:
        """Groups of pictures, as many abreast as there is room for."""
        pairs = all(len(group.pictures) <= _PAIR for group in groups)
        self._blocks.append(("pairs" if pairs else "groups", groups))

    def facts(self, facts: Mapping[str, str]) -> None:
        """A box of names and what they stand for, in whole sentences or hashes."""
        self._blocks.append(("facts", facts))

    def command(self, line: str) -> None:
        """A line for the shell."""
        self._blocks.append(("command", line))

    def html(self) -> str:
        """The whole page."""
        return render("page.html", title=self.title, blocks=self._blocks, dark_paper=DARK_PAPER)

    def write(self, path: Path) -> None:
        """Write the page to a file. Raises InputError where it cannot be written."""
        try:
            files.write_text(path, self.html())
        except OSError as error:
            raise files.failure(path, error) from error


def _cell(part: Chart | Sequence[Table], wide: bool) -> _Cell:
    if not isinstance(part, Chart):
        return _Cell(wide, tables=part)
    width = _WIDTH if wide else (_WIDTH - _GAP) / 2
    height = part.height or (0.8 * _HEIGHT if wide else _HEIGHT)
    light, dark = (figure_url(part.draw, width, height, dark=dark) for dark in (False, True))
    return _Cell(wide, text=part.text, light=light, dark=dark)


def render(template: str, **parts: Any) -> str:
    """One of the templates, filled."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=html_text,  # controls are escaped besides markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**parts)


def data_url(data: bytes, kind: str) -> str:
    """The URL that holds an image: `kind` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def figure_url(draw: Callable[[Figure], None], width: float, height: float, *, dark: bool = False) -> str:
    """The URL that holds the figure `draw` fills; see `draw_png`."""
    return data_url(draw_png(draw, width, height, dark=dark), "png")


def check_target(path: Path) -> None:
    """Raises InputError for a file that cannot be written, before any work is done."""
    if files.is_folder(path):
        raise InputError(f"{path}: is a folder; the name of a file to write would be right")
    if not files.is_folder(path.parent):
        raise InputError(f"{path}: cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: no permission to write in {path.parent}")
