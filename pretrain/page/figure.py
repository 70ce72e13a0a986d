"""matplotlib figures as PNGs, without a display, for a light or a dark page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from cycler import cycler
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FuncFormatter

# Both are legible on the light and on the dark page.
GREY = "#808080"
FILL = "#5799c7"  # a lighter C0

_DPI = 120
_INK = "#dddddd"  # of the dark page
DARK_PAPER = "#1b1d1f"
_DARK: Any = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), DARK_PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": "#777777",
    "axes.prop_cycle": cycler(
        color=(FILL, "#ff9f4a", "#6cc36c", "#e57373", "#b39ddb", "#bc8f7d", "#f0a3d2", "#a0a0a0")
    ),
}
# Where DejaVu has no glyph for a name, the first of these that is installed has it.
_FALLBACK_FONTS = ("Noto Sans CJK KR", "Noto Sans CJK JP", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo")


def draw_png(draw: Callable[[Figure], None], width: float, height: float, *, dark: bool = False) -> bytes:
    """The PNG of a figure of `width` × `height` inches that `draw` fills, in the colours of the light or dark page."""
    with rc_context(_DARK if dark else {}):
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")  # no pyplot: no display, no state
        draw(figure)
        return encode_figure(figure)


def encode_figure(figure: Figure, dpi: int = _DPI) -> bytes:
    """The PNG of a figure."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that no font here has
        figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    return data.getvalue()


@cache
def name_style() -> dict[str, Any]:
    """Text properties for text from outside: a font that has its letters, and never read as mathematics."""
    installed = {font.name for font in fontManager.ttflist}
    return {
        "parse_math": False,
        "fontfamily": ["DejaVu Sans", *(font for font in _FALLBACK_FONTS if font in installed)],
    }


def set_frame(axes: Axes, title: str) -> None:
    """A plain title on the left, a light grid, and no frame above and on the right."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def mark(axes: Axes, x: float) -> None:
    """A dotted line at `x`, in the colour of the page's text."""
    axes.axvline(x, color=rcParams["text.color"], linestyle=":")


def set_plain_ticks(*axes: Any) -> None:
    """Ticks of an x or y axis as people write numbers: 1,500 and 20k, never 1.5e3."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale:
            return f"{value / scale:g}{unit}"
    return f"{value:,.0f}" if value == round(value) else f"{value:g}"
