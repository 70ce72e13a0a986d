"""What the blocks of a network attend to: how far on average, and by attention rollout.

Axes: b images, n tokens (the class token first, where there is one), g patches along a side, e width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from pretrain.model.block import Attention
from pretrain.model.vit import VisionTransformer


@dataclass(frozen=True)
class Attended:
    """What a network attended to in b images, float32 on the CPU.

    distances: [b, layers, heads], the mean attention distance in pixels.
    rollout: [b, g²], the share of each patch in the output; with a class token they sum to less than 1.
    """

    distances: Tensor
    rollout: Tensor


def attention_scores(qkv: Tensor, heads: int) -> Tensor:
    """q·kᵀ/√e, [b, heads, n, n] (query, key), of what a block's `qkv` returns, [b, n, 3·heads·e].

    Their softmax over the keys is the attention, which the block's fused kernel does not return.
    """
    q, k, _ = rearrange(qkv, "b n (three heads e) -> three b heads n e", three=3, heads=heads)
    return (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)


@contextmanager
def watched(model: VisionTransformer, see: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, a forward pass of `model` with `features=True` calls `see` with each block's `attention_scores`.

    For the logits alone the last block computes the class token's attention only, of which nothing is seen.
    """

    def report(heads: int, module: nn.Module, inputs: tuple[Tensor], qkv: Tensor) -> None:
        see(attention_scores(qkv, heads))

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    handles = [layer.qkv.register_forward_hook(partial(report, layer.heads)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attend(model: VisionTransformer, images: Tensor) -> Attended:
    """Run `images` [b, c, h, w], as the network takes them, and look at the attention of every block.

    The distance is the ViT paper's (appendix D.7): between the query's patch and the keys', weighted by the attention
    and averaged over the queries; a patch's attention to itself counts, as 0 px. The class token has no place: as a
    query it is left out, as a key its attention is spread over the patches in proportion to theirs.
    """
    spec = model.spec
    patches = spec.grid**2  # the last tokens
    spacing = patch_distances(spec.grid, spec.patch_size).to(images.device)
    distances: list[Tensor] = []
    rollout = torch.eye(spec.tokens, device=images.device)

    def see(scores: Tensor) -> None:
        nonlocal rollout
        # The softmax over the patches alone: the same as to leave the class token out of the attention and normalise
        # again, but defined where the class token gets all of it.
        distances.append(mean_distance(scores[..., -patches:, -patches:].softmax(dim=-1), spacing))
        rollout = rollout_step(rollout, scores.softmax(dim=-1))

    with watched(model, see):
        model(images, features=True)
    output = rollout[:, 0] if spec.pool == "cls" else rollout.mean(dim=1)
    return Attended(torch.stack(distances, dim=1).cpu(), output[:, -patches:].cpu())


def patch_distances(grid: int, patch_size: int) -> Tensor:
    """Distances in pixels between the centres of patches, float32 [g², g²], row by row."""
    sides = torch.arange(grid) * float(patch_size)
    centres = torch.cartesian_prod(sides, sides)
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(attention: Tensor, spacing: Tensor) -> Tensor:
    """The mean distance of keys from queries, weighted by the attention: [b, heads, g², g²], [g², g²] → [b, heads]."""
    return (attention * spacing).sum(dim=-1).mean(dim=-1)


def rollout_step(below: Tensor, attention: Tensor) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928) through one more layer.

    The mean over heads of `attention` [b, heads, n, n], and the identity for the residual connection, in equal parts,
    times the rollout of the layers `below`, [b, n, n] or the identity [n, n]. Rows sum to 1. Returns [b, n, n].
    """
    mean = attention.mean(dim=1)
    mixed = mean + torch.eye(mean.shape[-1], device=mean.device)
    return mixed / mixed.sum(dim=-1, keepdim=True) @ below
