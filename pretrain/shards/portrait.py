"""A data set at a glance: its survey and a contact sheet as one HTML page, or as one picture."""

from __future__ import annotations

import base64
import io
import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from pretrain import files
from pretrain.console import printable
from pretrain.errors import InputError
from pretrain.index.indexfile import INDEX_NAME
from pretrain.shards.charts import GREY, Chart, bytes_text, charts, constants, name_style, shortened
from pretrain.shards.sheet import SIDE, Tile, contact_sheet
from pretrain.shards.survey import Survey, spread, unreadable_text

_DPI = 120
_WIDTH, _GAP = 12.8, 0.2  # inches of a page, and between its halves
_LETTERS_A_LINE = 170
_COLUMNS = 8  # of the contact sheet
_SHEET_TITLE, _SHEET_ROW = 40, 210  # pixels
_AMISS, _TILE, _UNREADABLE = "#aa3333", "#f4f4f4", "#bbbbbb"
_FILES_NAMED = 3
_SHEET_NOTE = "spread over the classes; below each its class and its id (shards.py locate INDEX ID finds it)"

_STYLE = """
:root { color-scheme: light; }
body { margin: 2rem auto; max-width: 78rem; padding: 0 1.5rem; background: #fff; color: #222;
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; font-weight: 600; overflow-wrap: anywhere; margin-bottom: 0.3rem; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2rem 0 0.5rem; }
.note { color: #666; font-size: 0.85rem; overflow-wrap: anywhere; margin: 0.2rem 0; }
.amiss { color: #a33; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; margin: 1.2rem 0; }
dl div { border-top: 2px solid #1f77b4; padding-top: 0.4rem; }
dt { color: #666; font-size: 0.8rem; }
dd { margin: 0; font-size: 1.15rem; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; margin: 1.5rem 0; }
.charts > * { margin: 0; min-width: 0; }
img { display: block; width: 100%; }
.wide { grid-column: 1 / -1; }
.tables { display: flex; gap: 2rem; }
table { flex: 1; border-collapse: collapse; align-self: start; font-size: 0.85rem; }
caption, td { text-align: left; padding: 0.25rem 0; overflow-wrap: anywhere; }
td { border-top: 1px solid #eee; }
td + td { text-align: right; color: #666; white-space: nowrap; padding-left: 0.5rem; }
.sheet { display: grid; grid-template-columns: repeat(8, 1fr); gap: 0.9rem; margin: 0.8rem 0 2rem; }
.sheet figure { margin: 0; min-width: 0; }
.sheet img, .sheet .unreadable { aspect-ratio: 1; object-fit: contain; background: #f4f4f4; }
.sheet .unreadable { display: grid; place-items: center; background: #bbb; }
.pixels { image-rendering: pixelated; }
figcaption { font-size: 0.75rem; margin-top: 0.2rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
figcaption span { display: block; color: #888; }
@media (max-width: 50rem) { .charts { grid-template-columns: 1fr; } .sheet { grid-template-columns: repeat(4, 1fr); } }
"""


@dataclass(frozen=True)
class Portrait:
    """What page and picture show."""

    survey: Survey
    tiles: Sequence[Tile]

    @property
    def title(self) -> str:
        """The folders (or files) of the indices."""
        paths = [file.path for file in self.survey.index.files]
        names = [str(path.parent if path.name == INDEX_NAME else path) for path in paths]
        more = [f"{len(names) - _FILES_NAMED} more"] if len(names) > _FILES_NAMED else []
        return " + ".join(names[:_FILES_NAMED] + more)

    @property
    def shown(self) -> str:
        return f"{len(self.tiles)} of {self.survey.index.samples:,} samples"

    def headline(self) -> dict[str, str]:
        """The figures that come first: what they count -> figure."""
        survey = self.survey
        width, height = (spread(axis)["median"] for axis in survey.sizes.T)
        counts = survey.class_samples
        empty = int((counts == 0).sum())
        return {
            "samples": f"{survey.index.samples:,}",
            "bytes": bytes_text(survey.bytes),
            "shards": f"{len(survey.shard_bytes):,}",
            f"classes, {empty:,} empty" if empty else "classes": f"{len(counts):,}",
            "labels a sample": f"{survey.labels_mean:,.2f}" if survey.index.multilabel else "1",
            "median image": f"{width:,.10g} × {height:,.10g}" if width else "none",
            "unreadable": f"{len(survey.unreadable):,} of {len(survey.looks):,}",
            "index hash": survey.index.hash[:12],
        }

    def amiss(self) -> list[str]:
        """Sentences on what does not decode."""
        found = []
        if self.survey.unreadable:
            found.append(_sentence(unreadable_text(self.survey.figures()["images"])))
        dark = [tile for tile in self.tiles if tile.image is None]
        if dark:
            found.append(f"On the contact sheet {len(dark):,} of {len(self.tiles):,} do not decode.")
        return found


def portray(survey: Survey) -> Portrait:
    """Choose and read the samples of the contact sheet. Raises InputError for a shard that cannot be read."""
    return Portrait(survey, contact_sheet(survey.index))


def check_target(path: Path) -> None:
    """Raises InputError for a file that cannot be written, before any work is done."""
    if files.is_folder(path):
        raise InputError(f"{path}: is a folder; the name of a file to write would be right")
    if not files.is_folder(path.parent):
        raise InputError(f"{path}: cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: no permission to write in {path.parent}")


def write_page(portrait: Portrait, path: Path) -> None:
    """One HTML file that needs no other. Raises InputError when it cannot be written."""
    _write(path, page(portrait).encode(errors="replace"))


def write_picture(portrait: Portrait, path: Path) -> None:
    """The same as one PNG. Raises InputError when it cannot be written."""
    _write(path, _encoded(picture(portrait), "png"))


def page(portrait: Portrait) -> str:
    """The HTML, images and style included."""
    files = portrait.survey.index.files
    several = [f"{file.path}: {file.samples:,} samples" for file in files] if len(files) > 1 else []
    cards = "".join(
        f"<div><dt>{_html(name)}</dt><dd>{_html(figure)}</dd></div>" for name, figure in portrait.headline().items()
    )
    shown = "\n".join(_chart_html(*placed) for row in _rows(portrait.survey) for placed in row)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_html(portrait.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_html(portrait.title)}</h1>
{_notes(several)}
<dl>{cards}</dl>
{_notes(portrait.amiss(), "note amiss")}
{_notes(constants(portrait.survey))}
<section class="charts">
{shown}
</section>
<h2>{portrait.shown}</h2>
{_notes([_sentence(_SHEET_NOTE)])}
<section class="sheet">
{"".join(map(_tile_html, portrait.tiles))}
</section>
{_notes([f"Index hash {portrait.survey.index.hash}"])}
</body>
</html>
"""


def picture(portrait: Portrait) -> Image.Image:
    """Header, charts and contact sheet, one below the other."""
    bands = [[_header(portrait)]]
    for row in _rows(portrait.survey):
        bands.append([_drawn(chart.draw, width, height) for chart, width, height in row])
    bands.append([_sheet(portrait)])
    gap = round(_GAP * _DPI)
    width = round(_WIDTH * _DPI) + 2 * gap
    whole = Image.new("RGB", (width, gap + sum(band[0].height + gap for band in bands)), "white")
    y = gap
    for band in bands:
        x = gap
        for part in band:
            whole.paste(part, (x, y))
            x += part.width + gap
        y += band[0].height + gap
    return whole


def _rows(survey: Survey) -> list[list[tuple[Chart, float, float]]]:
    """Charts side by side with (width, height) in inches: half charts in pairs; one that is left alone has the
    whole width.
    """
    found = charts(survey)
    rows: list[list[Chart]] = [[chart] for chart in found if chart.wide]
    halves = [chart for chart in found if not chart.wide]
    rows += [halves[at : at + 2] for at in range(0, len(halves), 2)]
    half = (_WIDTH - _GAP) / 2
    return [
        [(chart, half, max(other.height for other in row)) for chart in row]
        if len(row) == 2
        else [(chart, _WIDTH, chart.height if chart.wide else 0.8 * chart.height) for chart in row]
        for row in rows
    ]


def _drawn(draw: Callable[[Figure], None], width: float, height: float) -> Image.Image:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    draw(figure)
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class name in a script no font here has
        figure.savefig(data, format="png")
    return Image.open(data).convert("RGB")


def _header(portrait: Portrait) -> Image.Image:
    cards = portrait.headline()
    notes = [
        (line, colour)
        for sentences, colour in ((portrait.amiss(), _AMISS), (constants(portrait.survey), GREY))
        for sentence in sentences
        for line in textwrap.wrap(sentence, _LETTERS_A_LINE)
    ]
    height = 1.3 + 0.18 * len(notes)

    def draw(figure: Figure) -> None:
        def text(x: float, inches_down: float, words: str, **style: Any) -> None:
            figure.text(x, 1 - inches_down / height, printable(words), va="top", **name_style(), **style)

        text(0.005, 0, shortened(portrait.title, 100), fontsize=15)
        for number, (name, value) in enumerate(cards.items()):
            x = 0.005 + number / len(cards)
            text(x, 0.55, value, fontsize=13)
            text(x, 0.87, name, fontsize=8, color=GREY)
        for number, (line, colour) in enumerate(notes):
            text(0.005, 1.2 + 0.18 * number, line, fontsize=8, color=colour)

    return _drawn(draw, _WIDTH, height)


def _sheet(portrait: Portrait) -> Image.Image:
    rows, cell = -(-len(portrait.tiles) // _COLUMNS), round(_WIDTH * _DPI / _COLUMNS)
    height = _SHEET_TITLE + rows * _SHEET_ROW

    def draw(figure: Figure) -> None:
        figure.text(0.005, 1, f"{portrait.shown}, {_SHEET_NOTE}", fontsize=10, va="top")
        for number, tile in enumerate(portrait.tiles):
            left = number % _COLUMNS * cell + (cell - SIDE) // 2
            bottom = height - _SHEET_TITLE - number // _COLUMNS * _SHEET_ROW - SIDE
            figure.figimage(np.asarray(_square(tile.image)), left, bottom)
            middle = left + SIDE / 2
            style = {"fontsize": 7.5, "ha": "center", "transform": None, **name_style()}
            figure.text(middle, bottom - 16, shortened(tile.caption, 24), **style)
            figure.text(middle, bottom - 30, f"id {tile.sample_id}", **{**style, "color": GREY})
            if tile.image is None:
                figure.text(middle, bottom + SIDE / 2, "unreadable", va="center", **style)

    return _drawn(draw, _WIDTH, height / _DPI)


def _square(image: Image.Image | None) -> Image.Image:
    """The image in the middle of a tile, enlarged where it is smaller; grey without one."""
    if image is None:
        return Image.new("RGB", (SIDE, SIDE), _UNREADABLE)
    how = Image.Resampling.NEAREST if _small(image) else Image.Resampling.LANCZOS
    return ImageOps.pad(image, (SIDE, SIDE), how, _TILE)


def _small(image: Image.Image) -> bool:
    """Whether an image is enlarged, and better shown pixel by pixel and stored without loss."""
    return max(image.size) < SIDE


def _chart_html(chart: Chart, width: float, height: float) -> str:
    kind = ' class="wide"' if width == _WIDTH else ""
    if chart.tables:
        tables = "".join(
            f"<table><caption>{_html(heading)}</caption>"
            + "".join(f"<tr><td>{_html(name)}</td><td>{samples:,}</td></tr>" for name, samples in rows)
            + "</table>"
            for heading, rows in chart.tables.items()
        )
        return f'<div{kind}><div class="tables">{tables}</div></div>'
    image = _drawn(chart.draw, width, height)
    return f'<figure{kind}><img src="{_data_url(image, "png")}" alt="{_html(chart.text)}"></figure>'


def _tile_html(tile: Tile) -> str:
    words = f"{_html(tile.caption)}<span>id {tile.sample_id}</span>"
    if tile.image is None:
        fault = _html(tile.fault)
        shown = f'<div class="unreadable" role="img" aria-label="{fault}" title="{fault}">unreadable</div>'
    else:
        small = _small(tile.image)
        source = _data_url(tile.image, "png" if small else "jpeg")
        kind = ' class="pixels"' if small else ""
        shown = f'<img{kind} src="{source}" alt="{_html(tile.caption)}, id {tile.sample_id}">'
    return f'<figure>{shown}<figcaption title="{_html(tile.caption)}">{words}</figcaption></figure>\n'


def _data_url(image: Image.Image, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(_encoded(image, kind)).decode()}"


def _encoded(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, quality=88)
    return data.getvalue()


def _html(text: str) -> str:
    """Text as it shows in HTML, in an attribute's quotes too."""
    return escape(printable(text))


def _notes(sentences: Sequence[str], kind: str = "note") -> str:
    return "".join(f'<p class="{kind}">{_html(sentence)}</p>' for sentence in sentences)


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _write(path: Path, data: bytes) -> None:
    try:
        with files.atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise files.failure(path, error) from error
