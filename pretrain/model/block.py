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
        if hasattr(self.weight, "ds_id") and not torch.compiler.is_compiling():
            return _PartitionedLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class _PartitionedLinear(torch.autograd.Function):
    """F.linear, bit for bit, for weights that DeepSpeed takes apart between forward and backward (ZeRO-3).

    torch would keep a view of the weight for the backward pass, and with it the whole weight in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(end_dim=-2)
        of_weight = flat.T @ x.flatten(end_dim=-2)
        return gradient @ weight, of_weight, flat.sum(dim=0) if ctx.biased else None


class Attention(nn.Module):
    """Multi-head self-attention, [b, n, d] → [b, n, d]. No dropout on q, k, v or on the attention weights.

    With `class_only`, [b, n, d] → [b, 1, d]: the first token's output.
    """

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = Linear(spec.width, 3 * spec.width, bias=spec.qkv_bias)  # rows: all heads of q, then of k, then of v
        self.out = Linear(spec.width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, class_only: bool = False) -> Tensor:
        return self.dropout(self.out(self._first_token(x) if class_only else self._tokens(x)))

    def _tokens(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(one, "b n (heads e) -> b heads n e", heads=self.heads) for one in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n e -> b n (heads e)")

    def _first_token(self, x: Tensor) -> Tensor:
        """What `_tokens` gives for the first token, without k and v of any.

        A head's score is q·(K xᵢ) = (Kᵀ q)·xᵢ, and its output V Σ aᵢ xᵢ, as the matrices K and V (its rows of `qkv`)
        are the same for every token i. So the heads' queries attend to the tokens themselves. The bias of k adds the
        same to all scores of a head, which softmax takes away again; that of v is added whole, as the weights aᵢ sum
        to 1.
        """
        width = x.shape[-1]
        of_q, of_k, of_v = self.qkv.weight.split(width)
        bias_q, _, bias_v = (None, None, None) if self.qkv.bias is None else self.qkv.bias.split(width)
        q = rearrange(F.linear(x[:, 0], of_q, bias_q), "b (heads e) -> heads b e", heads=self.heads)
        of_k, of_v = (rearrange(one, "(heads e) d -> heads e d", heads=self.heads) for one in (of_k, of_v))
        q = rearrange(q @ of_k, "heads b d -> b heads d") * (width // self.heads) ** -0.5
        precise = torch.promote_types(x.dtype, torch.float32)  # rounded to half precision, scores are too coarse
        weights = (q.to(precise) @ x.to(precise).mT).softmax(dim=-1)
        found = rearrange(weights.to(x.dtype) @ x, "b heads d -> heads b d") @ of_v.mT
        found = rearrange(found, "heads b e -> b 1 (heads e)")
        return found if bias_v is None else found + bias_v


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
