"""The Vision Transformer as a first reading of the paper writes it down, to be timed beside the others.

Separate products for queries, keys and values; attention as product, softmax, product; every block on all tokens; the
class token is taken out after the last block and normalised alone.

Axes: b images, n tokens, d width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from pretrain.model.spec import ViTSpec
from pretrain.weights.formats.table import Row, third

_EPS = 1e-6


class Attention(nn.Module):
    """[b, n, d] → [b, n, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width / heads) ** 0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(-2, -1) / self.scale, dim=-1)
        return self.out(rearrange(weights @ v, "b heads n e -> b n (heads e)"))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (heads e) -> b heads n e", heads=self.heads)


class Layer(nn.Module):
    """[b, n, d] → [b, n, d]."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(spec.width, eps=_EPS)
        self.attention = Attention(spec.width, spec.heads)
        self.mlp_norm = nn.LayerNorm(spec.width, eps=_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(spec.width, spec.mlp), nn.GELU(), nn.Dropout(spec.dropout), nn.Linear(spec.mlp, spec.width)
        )
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class LiteralViT(nn.Module):
    """images [b, c, h, w] → logits [b, k]."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.patches = nn.Conv2d(spec.channels, spec.width, spec.patch_size, stride=spec.patch_size)
        self.class_token = nn.Parameter(torch.zeros(spec.width))
        self.positions = nn.Parameter(0.02 * torch.randn(spec.tokens, spec.width))
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width, eps=_EPS)
        self.head = nn.Linear(spec.width, spec.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = rearrange(self.patches(images), "b d h w -> b (h w) d")
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.dropout(x + self.positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


def rows(spec: ViTSpec) -> list[Row]:
    """Which tensor of a LiteralViT holds which values of this project's network."""
    found = [
        Row("class_token", "class_token", "a b d -> (a b d)"),
        Row("positions", "position_embedding", "a n d -> (a n) d"),
    ]
    modules = {"patches": "patch_embedding", "norm": "norm", "head": "head"}
    for number in range(spec.layers):
        theirs, ours = f"layers.{number}", f"blocks.{number}"
        modules |= {f"{theirs}.attention_norm": f"{ours}.norm1", f"{theirs}.mlp_norm": f"{ours}.norm2"}
        modules |= {f"{theirs}.attention.out": f"{ours}.attention.out"}
        modules |= {f"{theirs}.mlp.0": f"{ours}.mlp.fc1", f"{theirs}.mlp.3": f"{ours}.mlp.fc2"}
        for part, name in enumerate(("query", "key", "value")):
            for kind in ("weight", "bias"):
                fused = f"{ours}.attention.qkv.{kind}"
                found.append(Row(f"{theirs}.attention.{name}.{kind}", fused, part=third(spec.width, part)))
    found += [
        Row(f"{theirs}.{kind}", f"{ours}.{kind}") for theirs, ours in modules.items() for kind in ("weight", "bias")
    ]
    return found
