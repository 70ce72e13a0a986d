"""What was found inside a network: its embeddings and, where there are images, its attention."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetune.inside.attention import Attended, attend, patch_distances
from finetune.inside.embeddings import Components, position_similarity, principal_components
from finetune.inside.examples import Example, Examples
from pretrain.errors import InputError
from pretrain.model.arithmetic import exact_float32
from pretrain.progress import Progress
from pretrain.record.folder import versions
from pretrain.shards.survey import spread_ids
from pretrain.weights.load import Weights

EXAMPLES = 128  # images over which the attention distance is averaged, as in the paper
SHOWN = 16  # of them as pictures
_AT_ONCE = 16  # images
_SCORES = 1 << 25  # attention scores of one layer in memory: 128 MiB


@dataclass(frozen=True)
class Seen:
    """One image that was run: its name and caption, the sha256 of its file and, where it is shown, the pixels that the
    network saw, float32 [c, h, w] in 0 … 1.
    """

    name: str
    caption: str
    sha256: str
    pixels: Tensor | None


@dataclass(frozen=True)
class Attention:
    """The attention in `seen`, images taken evenly from `found`."""

    seen: Sequence[Seen]
    found: int
    attended: Attended
    uniform: float  # the mean distance in pixels if every patch attended to all alike

    @property
    def distances(self) -> Tensor:
        """The mean attention distance over the images in pixels, float64 [layers, heads]."""
        return self.attended.distances.double().mean(dim=0)


@dataclass(frozen=True)
class View:
    """What was found. `similarity` is `position_similarity`; there is no attention without images."""

    weights: Weights
    components: Components
    similarity: Tensor
    attention: Attention | None

    def figures(self) -> dict[str, Any]:
        """The content of inside.json."""
        weights, spec = self.weights, self.weights.spec
        found: dict[str, Any] = {
            "weights": {
                "source": str(weights.source),
                "sha256": weights.sha256,
                "step": weights.step,
                "averaged": weights.averaged,
            },
            "network": asdict(spec),
            "filters": {"explained_variance": self.components.explained.tolist()},
            "positions": {"kind": spec.positions, "grid": spec.grid, "neighbour_similarity": self.neighbours()},
            "attention_distance": None,
            "images": None,
            "versions": versions(),
        }
        if self.attention:
            found["attention_distance"] = {
                "unit": "pixels",
                "uniform": self.attention.uniform,
                "layers": self.attention.distances.tolist(),
            }
            found["images"] = {
                "found": self.attention.found,
                "used": [{"name": one.name, "sha256": one.sha256} for one in self.attention.seen],
            }
        return found

    def neighbours(self) -> float | None:
        """The mean similarity of the positions of patches side by side; None for a single patch."""
        grid = range(len(self.similarity))
        down = [self.similarity[i, j, i + 1, j] for i in grid[:-1] for j in grid]
        along = [self.similarity[i, j, i, j + 1] for i in grid for j in grid[:-1]]
        return float(torch.stack(down + along).mean()) if down else None


def look_inside(weights: Weights, examples: Examples | None) -> View:
    """Look at the weights and, with examples, at what the network attends to in them.

    Raises:
        InputError: weights that are not finite, or an example that cannot be read.
    """
    broken = [name for name, tensor in weights.tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(
            f"weights {weights.source}: {broken[0]} holds NaN or infinity, as do {len(broken) - 1} other tensors of "
            f"{len(weights.tensors)}; give weights from before the run diverged"
        )
    return View(
        weights,
        principal_components(weights.tensors["patch_embedding.weight"]),
        position_similarity(weights.spec, weights.tensors),
        look_at(weights, examples) if examples else None,
    )


def look_at(weights: Weights, examples: Examples) -> Attention:
    """Run the examples. Raises InputError for one that cannot be read."""
    spec = weights.spec
    device = _device()
    model = weights.model().to(device)
    batch = max(1, min(_AT_ONCE, _SCORES // (spec.heads * spec.tokens**2)))
    shown = set(spread_ids(len(examples.taken), SHOWN).tolist())
    black, white = (weights.preprocess(Image.new("RGB", (8, 8), colour)) for colour in ("black", "white"))

    seen: list[Seen] = []
    parts: list[Attended] = []
    with Progress("attention", "images", len(examples.taken)) as progress:
        for some in _batches(examples.taken, batch):
            inputs = []
            for example in some:
                data = example.read()
                inputs.append(weights.preprocess(example.decoded(data, spec.channels)))
                # Back from the network's scale, whatever it is, to that of a picture.
                pixels = (inputs[-1] - black) / (white - black) if len(seen) in shown else None
                seen.append(Seen(example.name, example.caption, hashlib.sha256(data).hexdigest(), pixels))
            with exact_float32():
                parts.append(attend(model, torch.stack(inputs).to(device)))
            progress.advance(len(some))
    attended = Attended(torch.cat([part.distances for part in parts]), torch.cat([part.rollout for part in parts]))
    uniform = float(patch_distances(spec.grid, spec.patch_size).mean())
    return Attention(seen, examples.found, attended, uniform)


def _device() -> torch.device:
    """The accelerator where there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    left = iter(examples)
    while some := list(islice(left, size)):
        yield some
