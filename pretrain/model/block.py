"""The encoder block: attention, MLP, residuals; what of it is computed again, and what is compiled.

Axes: b images, n tokens, d width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec

# What of a block is computed again in the backward pass: nothing, all but its input, all but the products of matrices
# and the attention, or everything in every k-th block.
Checkpointing = Literal["none", "full", "selective"] | int

# The dear operations, whose results selective checkpointing keeps; torch chooses among the kernels for attention.
_aten = torch.ops.aten
_KEPT = [
    op.default
    for op in (
        _aten.mm,
        _aten.addmm,
        _aten.bmm,
        _aten.baddbmm,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
    )
]


class Linear(nn.Linear):
    """nn.Linear without torch's own draw, which would double the time to build a large model.

    Holds NaN until `initialize` or `load_tensors` has run, so that a forgotten one is seen at the first loss.
    """

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)

    def forward(self, x: Tensor) -> Tensor:
        if self._partitioned:
            return _PartitionedLinear.apply(x, self.weight, self.bias, slice(None))
        return F.linear(x, self.weight, self.bias)

    def outputs(self, x: Tensor, rows: slice) -> Tensor:
        """Those outputs alone that `rows` of the weight make; a forward hook does not see them.

        Slower for all rows: the gradient of a slice is copied into zeros of the whole weight's shape.
        """
        if self._partitioned:
            return _PartitionedLinear.apply(x, self.weight, self.bias, rows)
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])

    @property
    def _partitioned(self) -> bool:
        return hasattr(self.weight, "ds_id") and not torch.compiler.is_compiling()


class _PartitionedLinear(torch.autograd.Function):
    """`rows` of F.linear, bit for bit, for weights that DeepSpeed takes apart between forward and backward (ZeRO-3).

    torch would keep a view of the weight for the backward pass, and with it the whole weight in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased, ctx.rows = bias is not None, rows
        return F.linear(x, weight[rows], None if bias is None else bias[rows])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(end_dim=-2)
        of_weight, of_bias = torch.zeros_like(weight), None
        torch.mm(flat.T, x.flatten(end_dim=-2), out=of_weight[ctx.rows])
        if ctx.biased:
            of_bias = flat.new_zeros(len(weight))
            of_bias[ctx.rows] = flat.sum(dim=0)
        return gradient @ weight[ctx.rows], of_weight, of_bias, None


class Attention(nn.Module):
    """Multi-head self-attention, [b, n, d] → [b, n, d]. No dropout on q, k, v or on the attention weights.

    With `class_only`, [b, n, d] → [b, 1, d]: the first token's output, which needs k and v of all, but only its own q.
    """

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = Linear(spec.width, 3 * spec.width, bias=spec.qkv_bias)  # rows: all heads of q, then of k, then of v
        self.out = Linear(spec.width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        if class_only:
            width = x.shape[-1]
            q = self.qkv.outputs(x[:, :1], slice(0, width))
            k, v = self.qkv.outputs(x, slice(width, 3 * width)).chunk(2, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(one, "b n (heads e) -> b heads n e", heads=self.heads) for one in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.out(rearrange(x, "b heads n e -> b n (heads e)")))


class MLP(nn.Module):
    """Linear → GELU → Linear, [b, n, d] → [b, n, d]."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.fc1 = Linear(spec.width, spec.mlp)
        self.gelu = nn.GELU(approximate="tanh" if spec.gelu == "tanh" else "none")
        self.dropout1 = nn.Dropout(spec.dropout)
        self.fc2 = Linear(spec.mlp, spec.width)
        self.dropout2 = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.fc2(self.dropout1(self.gelu(self.fc1(x)))))


class Block(nn.Module):
    """One pre-norm encoder block, [b, n, d] → [b, n, d]; with `class_only`, → [b, 1, d], the first token's output.

    What is checkpointed or compiled lies within `forward`, so that hooks on a block see neither.
    """

    def __init__(self, spec: ViTSpec, trained: "Encode | None" = None, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.attention = Attention(spec)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = MLP(spec)
        self.trained = trained or Block.encode
        self.drop_path = drop_path

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        # Drawn out here: what is computed again takes the same masks, and blocks of every rate share a compiled graph.
        kept = self._draw_kept(x) if self.training and self.drop_path else None
        encode = self.trained if torch.is_grad_enabled() else Block.encode
        return encode(self, x, kept, class_only)

    def encode(self, x: Tensor, kept: Tensor | None = None, class_only: bool = False) -> Tensor:
        attended = self.attention(self.norm1(x), class_only)
        x = (x[:, :1] if class_only else x) + (attended if kept is None else kept[0] * attended)
        mixed = self.mlp(self.norm2(x))
        return x + (mixed if kept is None else kept[1] * mixed)

    def _draw_kept(self, x: Tensor) -> Tensor:
        """[2, b, 1, 1], for either branch and each sample: 0 where it is dropped, else 1 / (1 - drop_path)."""
        share = 1 - self.drop_path
        return torch.empty(2, len(x), 1, 1, device=x.device).bernoulli_(share).div_(share).to(x.dtype)


Encode = Callable[[Block, Tensor, Tensor | None, bool], Tensor]


def encoders(spec: ViTSpec, checkpointing: Checkpointing, compiled: bool) -> list[Encode]:
    """How each block of the network runs where gradients are wanted; blocks that run alike share one function."""
    every = checkpointing if isinstance(checkpointing, int) else 1
    if not 0 < every <= spec.layers:
        raise InputError(
            f"train.activation_checkpointing: {every} stands for every {every}-th block; this model has {spec.layers}"
        )
    again = partial(checkpoint, Block.encode, use_reentrant=False, preserve_rng_state=spec.dropout > 0)
    if checkpointing == "selective":
        again.keywords["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    chosen: list[Encode] = [Block.encode, Block.encode if checkpointing == "none" else again]
    if compiled:
        chosen = [torch.compile(encode, fullgraph=True, dynamic=False) for encode in chosen]
    return [chosen[number % every == 0] for number in range(spec.layers)]
