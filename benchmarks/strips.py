"""A figure of measurements: a row for each contender, a point for each measurement, a line at the median."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.table import OUT
from pretrain.page.figure import GREY, draw_png


def save_strips(name: str, title: str, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Write runs/bench/NAME.png.

    Args:
        name: of the file, as of the JSON beside it.
        title: of the figure.
        panels: the label of each panel's axis → the measurements of each contender.
    """

    def draw(figure: Figure) -> None:
        figure.suptitle(title, fontsize=10)
        for axes, (label, values) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for row, found in enumerate(values.values()):
                axes.plot(found, [row] * len(found), "o", color=f"C{row % 10}", alpha=0.5, markersize=4)
                middle = statistics.median(found)
                axes.vlines(middle, row - 0.3, row + 0.3, color=f"C{row % 10}", linewidth=2)
                axes.annotate(f"{middle:.3g}", (middle, row - 0.34), ha="center", va="bottom", fontsize=7, color=GREY)
            axes.set_yticks(range(len(values)), list(values))
            axes.set_ylim(len(values) - 0.4, -0.7)
            axes.set_xlim(left=0)
            axes.set_xlabel(label, fontsize=9)
            axes.tick_params(labelsize=8)
            axes.grid(axis="x", alpha=0.3)

    most = max(map(len, panels.values()))
    path = OUT / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(draw_png(draw, 1.2 + 4.4 * len(panels), 1.2 + 0.5 * most))
    print(path)
