"""A bar for each class, with its name and figure."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from pretrain.page.figure import FILL, name_style
from pretrain.page.page import Chart
from pretrain.page.text import shortened

MOST = 60  # bars that can be read; more classes are better drawn as a curve
_ONE_COLUMN, _COLUMN = 14, 20  # bars
_BEYOND = 1.15  # of the longest bar: room for its figure


def bar_chart(text: str, names: Sequence[str], values: Sequence[float], figures: Sequence[str]) -> Chart:
    """Bars in as many columns as they need, from top to bottom, column after column. `figures`: the values as text."""
    columns = 1 if len(names) <= _ONE_COLUMN else max(2, -(-len(names) // _COLUMN))
    rows = -(-len(names) // columns)
    height = None if columns == 1 else 0.9 + 0.2 * rows

    def draw(figure: Figure) -> None:
        figure.suptitle(text, fontsize=10, x=0.01, ha="left")
        for column, axes in enumerate(figure.subplots(1, columns, sharex=True, squeeze=False)[0]):
            part = slice(column * rows, min((column + 1) * rows, len(names)))
            at = range(part.stop - part.start)
            bars = axes.barh(at, values[part], height=0.65, color=FILL)
            axes.bar_label(bars, figures[part], padding=3, fontsize=7)
            axes.set_yticks(at, [shortened(name, 28) for name in names[part]], fontsize=8, **name_style())
            axes.set_ylim(rows - 0.4, -0.6)  # the first on top; a shorter last column has bars as thick
            axes.set_xlim(0, _BEYOND * max(values) or 1)
            axes.tick_params(length=0)
            axes.set_xticks([])
            axes.spines[:].set_visible(False)

    return Chart(text, draw, height)
