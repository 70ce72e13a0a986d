"""What was found inside a network as people look at it: figures, one page of them, and the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F

from finetune.inside.view import Attention, Seen, View
from pretrain import files
from pretrain.console import isolated
from pretrain.page.figure import GREY, draw_png, name_style, set_frame
from pretrain.page.page import Chart, Page
from pretrain.page.text import Table, shortened

FILTERS, POSITIONS, DISTANCES, ROLLOUT = "filters.png", "positions.png", "attention_distance.png", "rollout.png"
NUMBERS, PAGE = "inside.json", "index.html"

_WIDTH, _HEIGHT = 12.8, 5.4  # inches, of what takes the whole width of the page
_ROW = 1.82  # inches, of the rollout's rows
_FILTER_COLUMNS = 7  # as in the paper
_TILES = 14  # of the grid of position similarities, along a side; larger ones are drawn in part
_PAIRS = 4  # images side by side
_PITCH_ALONG, _PITCH_DOWN = 1.06, 1.2  # from tile to tile, in tiles


def write(view: View, folder: Path) -> Path:
    """Write figures, numbers and page to a folder that exists; returns the page's path.

    Figures that an earlier look left there and this one has none of are removed: they are of other weights.

    Raises:
        OSError: one cannot be written; names it.
    """
    drawn: dict[str, tuple[Callable[[Figure], None], float, float]] = {
        FILTERS: (partial(draw_filters, view=view), _WIDTH / 2, 4.2),
        POSITIONS: (partial(draw_positions, view=view), _WIDTH / 2, _HEIGHT),
    }
    if view.attention:
        drawn[DISTANCES] = (partial(draw_distances, attention=view.attention), _WIDTH / 2, 4.2)
        drawn[ROLLOUT] = (partial(draw_rollout, view=view), _WIDTH, _rollout_height(view.attention))
    for name in (FILTERS, POSITIONS, DISTANCES, ROLLOUT):
        if name in drawn:
            with files.atomic_write(folder / name) as file:
                file.write(draw_png(*drawn[name]))
        else:
            (folder / name).unlink(missing_ok=True)
    files.write_text(folder / NUMBERS, json.dumps(view.figures(), indent=2, allow_nan=False) + "\n")
    build_page(view).write(folder / PAGE)
    return folder / PAGE


def build_page(view: View) -> Page:
    """The page of a view."""
    weights, spec = view.weights, view.weights.spec
    page = Page(f"Inside {isolated(str(weights.source))}")
    page.cards(
        {
            "weights": "averaged" if weights.averaged else "raw",
            "step": "unknown" if weights.step is None else f"{weights.step:,}",
            "patches": f"{spec.grid} × {spec.grid} of {spec.patch_size} px",
            "layers × heads": f"{spec.layers} × {spec.heads}",
            "images": f"{len(view.attention.seen):,} of {view.attention.found:,}" if view.attention else "none",
            "sha256": weights.sha256[:12],
        }
    )
    page.heading("Embeddings")
    page.notes([_filters_note(view), _positions_note(view)])
    page.grid([Chart(f"{_filters_text(view)} {_positions_text(view)}", partial(_draw_embeddings, view=view), _HEIGHT)])
    if view.attention is None:
        page.notes(["No images were given: attention distance and rollout need some (--images)."], warning=True)
        return page
    attention = view.attention
    page.heading("Attention distance")
    page.notes([_distances_note(attention)])
    page.grid([Chart(_distances_text(attention), partial(draw_distances, attention=attention)), [_table(attention)]])
    page.heading("Attention rollout")
    page.notes([_rollout_note(view)])
    page.grid([Chart(_rollout_text(attention), partial(draw_rollout, view=view), _rollout_height(attention))])
    return page


# Embeddings


def _draw_embeddings(figure: Figure, view: View) -> None:
    halves: Any = figure.subfigures(1, 2)
    draw_filters(halves[0], view)
    draw_positions(halves[1], view)


def draw_filters(figure: FigureBase, view: View) -> None:
    """The principal components, each on a scale of its own whose middle is 0."""
    filters = view.components.filters
    _title(figure, f"First {len(filters)} principal components of the patch embedding")
    labelled = [
        (one / one.abs().max() / 2 + 0.5, f"{100 * share:.1f} %")
        for one, share in zip(filters, view.components.explained.tolist(), strict=True)
    ]
    _draw_tiles(figure, labelled, _FILTER_COLUMNS)


def draw_positions(figure: FigureBase, view: View) -> None:
    """A tile for each patch: the similarity of its position with those of all patches."""
    grid = len(view.similarity)
    chosen = np.linspace(0, grid - 1, min(grid, _TILES)).round().astype(int)
    tiles = view.similarity.numpy()[np.ix_(chosen, chosen)]  # [t, t, g, g]
    framed = np.pad(tiles, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=np.nan)  # a gap behind each tile
    mosaic = framed.transpose(0, 2, 1, 3).reshape(len(chosen) * (grid + 1), -1)[:-1, :-1]
    axes = figure.subplots()
    _title(figure, "Cosine similarity of position embeddings")
    shown = axes.imshow(mosaic, vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
    ticks = np.arange(len(chosen)) * (grid + 1) + (grid - 1) / 2
    axes.set_xticks(ticks, chosen + 1)
    axes.set_yticks(ticks, chosen + 1)
    axes.set(xlabel="patch column", ylabel="patch row")
    axes.tick_params(labelsize=7, length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)


def _filters_text(view: View) -> str:
    spec, shares = view.weights.spec, view.components.explained
    return (
        f"The first {len(shares)} principal components of the {spec.width:,} filters of {spec.patch_size} × "
        f"{spec.patch_size} px, {100 * float(shares.sum()):.1f} % of their variance."
    )


def _filters_note(view: View) -> str:
    return (
        f"Left: {_filters_text(view)[0].lower()}{_filters_text(view)[1:]} Above each its share. Every component has a "
        "scale of its own; mid-grey is 0, and the sign means nothing."
    )


def _positions_text(view: View) -> str:
    grid, near = len(view.similarity), view.neighbours()
    beside = "" if near is None else f"; {round(near, 2) + 0.0:.2f} on average between neighbours"
    kind = "learned" if view.weights.spec.positions == "learned" else "fixed"
    return f"The cosine similarity of {grid} × {grid} {kind} position embeddings, each with all others{beside}."


def _positions_note(view: View) -> str:
    grid = len(view.similarity)
    part = f" Drawn are {_TILES} of the {grid} rows and columns." if grid > _TILES else ""
    return f"Right: {_positions_text(view)[0].lower()}{_positions_text(view)[1:]} A tile stands for a patch.{part}"


# Attention distance


def draw_distances(figure: Figure, attention: Attention) -> None:
    """A dot for each head, by layer."""
    distances = attention.distances.numpy()
    layers, heads = distances.shape
    axes = figure.subplots()
    set_frame(axes, f"Mean attention distance, {_count(len(attention.seen))}")
    colours = matplotlib.colormaps["turbo"](np.linspace(0.1, 0.9, heads))
    for head in range(heads):
        axes.scatter(range(1, layers + 1), distances[:, head], s=16, color=colours[head], label=f"head {head + 1}")
    axes.axhline(attention.uniform, color=GREY, linestyle=":")
    axes.set_ylim(0, 1.08 * max(attention.uniform, distances.max()) or 1)
    axes.set_xlim(0.5, layers + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer; dotted: attention to all patches alike", fontsize=9)
    axes.set_ylabel("pixels", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=7, ncols=-(-heads // 16), frameon=False)


def _distances_text(attention: Attention) -> str:
    first, last = attention.distances[0], attention.distances[-1]
    return (
        f"Mean attention distance by layer and head over {_count(len(attention.seen))}: heads at {first.min():.1f} to "
        f"{first.max():.1f} px in the first layer, {last.min():.1f} to {last.max():.1f} px in the last; "
        f"{attention.uniform:.1f} px if all patches were attended to alike."
    )


def _distances_note(attention: Attention) -> str:
    taken = f"{_count(len(attention.seen))}"
    if attention.found > len(attention.seen):
        taken += f", spread evenly over {attention.found:,}"
    return (
        "The distance in pixels between a patch and those that it attends to, weighted by the attention, averaged "
        f"over patches and images ({taken}). The class token is left out."
    )


def _table(attention: Attention) -> Table:
    rows = [
        (str(layer), *(f"{value:.1f}" for value in (heads.min(), heads.mean(), heads.max())))
        for layer, heads in enumerate(attention.distances, start=1)
    ]
    return Table(("layer", "nearest head", "mean", "farthest head"), rows, "Pixels")


# Rollout


def draw_rollout(figure: Figure, view: View) -> None:
    """Pairs: an image as the network sees it, and the same in proportion to the attention rollout."""
    assert view.attention is not None
    _title(figure, "Attention rollout: each image and, beside it, where the attention of the output leads")
    labelled = []
    for one, rollout in _shown(view.attention):
        image, masked = masked_image(one, rollout, view.weights.spec.patch_size)
        labelled += [(image, shortened(one.caption, 24)), (masked, "")]
    _draw_tiles(figure, labelled, 2 * _PAIRS)


def masked_image(seen: Seen, rollout: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The part of an image that the patches cover, [c, s, s] in 0 … 1, and the same times its rollout [g²], of which
    the largest value is 1; between the centres of patches it is interpolated.
    """
    assert seen.pixels is not None
    grid = round(len(rollout) ** 0.5)
    side = grid * patch_size
    mask = (rollout / rollout.max()).reshape(1, 1, grid, grid)
    mask = F.interpolate(mask, size=(side, side), mode="bilinear", align_corners=False)[0]
    image = seen.pixels[:, :side, :side]
    return image, image * mask


def _shown(attention: Attention) -> list[tuple[Seen, Tensor]]:
    rows = zip(attention.seen, attention.attended.rollout, strict=True)
    return [(one, rollout) for one, rollout in rows if one.pixels is not None]


def _rollout_text(attention: Attention) -> str:
    names = [isolated(one.caption) for one, _ in _shown(attention)]
    return f"{_count(len(names))}, each beside itself under its attention rollout: {', '.join(names)}."


def _rollout_note(view: View) -> str:
    output = "the class token" if view.weights.spec.pool == "cls" else "the mean of the tokens"
    return (
        f"Each image as the network sees it and, beside it, as bright as the share of each patch in {output} after the "
        "last layer: attention averaged over heads, in equal parts with the residual connection, multiplied through "
        "the layers. The brightest patch of each image is 1."
    )


def _rollout_height(attention: Attention) -> float:
    return 0.3 + _ROW * -(-len(_shown(attention)) // _PAIRS)


def _count(images: int) -> str:
    return f"{images:,} image" if images == 1 else f"{images:,} images"


def _title(figure: FigureBase, text: str) -> None:
    figure.suptitle(text, fontsize=10, x=0.01, ha="left")


def _draw_tiles(figure: FigureBase, labelled: Sequence[tuple[Tensor, str]], columns: int) -> None:
    """Images [c, h, w] in 0 … 1, grey or RGB, as squares in rows, with a label above each."""
    axes = figure.subplots()
    for number, (image, label) in enumerate(labelled):
        row, column = divmod(number, columns)
        left, top = _PITCH_ALONG * column, -_PITCH_DOWN * row
        pixels = image.permute(1, 2, 0).clamp(0, 1).numpy()
        axes.imshow(
            pixels[:, :, 0] if pixels.shape[2] == 1 else pixels,
            extent=(left, left + 1, top - 1, top),
            cmap="gray",
            vmin=0,
            vmax=1,
        )
        axes.text(left, top + 0.03, label, fontsize=7, va="bottom", **name_style())
    axes.set_xlim(0, _PITCH_ALONG * columns)
    axes.set_ylim(-_PITCH_DOWN * ((len(labelled) - 1) // columns) - 1, _PITCH_DOWN - 1)
    axes.set_anchor("NW")
    axes.axis("off")
