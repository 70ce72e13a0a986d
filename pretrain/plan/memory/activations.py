"""What the forward and backward passes hold, traced from the network's own blocks. Nothing is computed.

A network of the same sizes and at most three blocks runs on the meta device, whose tensors have shapes and no values;
the bytes of all that lives meanwhile are counted. Its first, middle and last block stand for those of the whole
network. Norms keep their statistics in fp32 there, as on GPUs; in half precision a CPU takes up to a thousandth less.

A compiled network is planned like one that is not. torch's compiler recomputes cheap operations where that saves memory
and joins others: an assumption, with what was measured behind it: on an H200, B/16, L/16 and H/14 took 0.4 to 1 % less
when compiled (docs/engine.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pretrain.model.depth import depth_of
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import Checkpointing, VisionTransformer
from pretrain.plan.job import Job
from pretrain.plan.memory.live import LiveBytes

_BLOCKS = 3  # a first, a middle and a last one


@dataclass(frozen=True)
class Part:
    """Bytes of a part of the network: the embedding, a block, or norm, head and loss together."""

    kept: int  # from its forward pass to its backward pass, its output among them
    forward: int  # the most while its forward pass runs, beyond what the parts before it keep
    backward: int  # the most while its backward pass runs, beyond the same, its parameters' gradients not among them
    backward_with_gradients: int  # the same where these gradients are new and stay until it ends
    gradients: int  # of its parameters, in the type computed in


@dataclass(frozen=True)
class _Case:
    """All that a trace is a function of."""

    spec: ViTSpec
    checkpointing: Checkpointing
    dtype: torch.dtype
    micro_batch: int
    loss: str
    device: str


def parts(job: Job) -> list[Part]:
    """The parts of the network in the order of its forward pass: embedding, blocks, head with loss."""
    spec, every = job.spec, job.checkpointing
    kinds: list[Checkpointing] = [every] * spec.layers
    if isinstance(every, int):
        kinds = ["none" if number % every else "full" for number in range(spec.layers)]
    traced = {kind: trace_of(job, kind) for kind in {*kinds}}
    found = [traced[kinds[0]][0]]
    for number, kind in enumerate(kinds):
        # The first and the last of the traced blocks, or those between them.
        place = 0 if number == 0 else number - spec.layers if number == spec.layers - 1 else 1
        found.append(traced[kind][1:-1][place])
    return _frozen(job, [*found, traced[kinds[0]][-1]])


def trace_of(job: Job, checkpointing: Checkpointing) -> tuple[Part, ...]:
    """The parts of a network with at most three blocks, of which each is checkpointed alike."""
    few = replace(job.spec, layers=min(job.spec.layers, _BLOCKS))
    micro = job.layout.micro_batch
    return _trace(_Case(few, checkpointing, job.dtype, micro, job.loss, job.device))


def _frozen(job: Job, found: list[Part]) -> list[Part]:
    """`found`, where parts below the depth `job.frozen` keep nothing: of them only the last one's output is needed."""
    if not job.frozen:
        return found
    spec = job.spec
    output = job.layout.micro_batch * spec.tokens * spec.width * job.dtype.itemsize
    last = min(job.frozen, len(found) - 1) - 1
    still = [
        Part(output if depth == last else 0, part.forward, 0, 0, part.gradients)
        for depth, part in enumerate(found[: last + 1])
    ]
    return [*still, *found[last + 1 :]]


@cache
def _trace(case: _Case) -> tuple[Part, ...]:
    spec, micro = case.spec, case.micro_batch
    with torch.device("meta"), _default_dtype(case.dtype):
        model = VisionTransformer(spec, 1 if case.checkpointing == "full" else case.checkpointing)
        _fuse_attention(model)
        if case.device != "cpu":
            _fuse_dropout(model)
        labels, valid = torch.zeros(micro, 1, dtype=torch.int64), torch.ones(micro, dtype=torch.float32)
        images = torch.empty(micro, spec.channels, spec.image_size, spec.image_size, dtype=case.dtype)
        with LiveBytes([*model.parameters(), labels, valid, images]) as bytes_:
            marks = _Marks(model, bytes_)
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda owner: bytes_.set_aside(owner.grad))
            loss = _loss(model(images), labels, valid, case.loss)
            marks.forward_ends()
            loss.backward()
            marks.backward_ends()
    gradients = [0] * (spec.layers + 2)
    for name, parameter in model.named_parameters():
        gradients[min(depth_of(name, spec.layers), spec.layers + 1)] += parameter.numel() * case.dtype.itemsize
    return marks.parts(gradients)


class _Marks:
    """Bytes at the borders between the parts of a network, which hooks on its blocks see."""

    def __init__(self, model: VisionTransformer, live: LiveBytes) -> None:
        self._live = live
        self._forward: list[tuple[int, int]] = []  # (live after a part, peak in it)
        self._backward: list[tuple[int, int]] = []  # peaks in a part, without and with gradients, from the last one on
        model.blocks[0].register_forward_pre_hook(lambda module, inputs: self._border(inputs[0]))
        for block in model.blocks:
            block.register_forward_hook(lambda module, inputs, output: self._border(output))

    def _border(self, x: Tensor) -> None:
        self.forward_ends()
        x.register_hook(lambda gradient: self.backward_ends())

    def forward_ends(self) -> None:
        """Of a part."""
        self._forward.append((self._live.live, self._live.peak))
        self._live.restart()

    def backward_ends(self) -> None:
        """Of a part."""
        self._backward.append((self._live.peak, self._live.peak_with_aside))
        self._live.restart()

    def parts(self, gradients: list[int]) -> tuple[Part, ...]:
        """From the embedding on, given the bytes of each part's gradients."""
        found, before = [], 0
        for number, ((after, forward), backward) in enumerate(
            zip(self._forward, reversed(self._backward), strict=True)
        ):
            without, together = (peak - before for peak in backward)
            later = sum(gradients[number + 1 :])
            found.append(Part(after - before, forward - before, without, together - later, gradients[number]))
            before = after
        return tuple(found)


def _loss(logits: Tensor, labels: Tensor, valid: Tensor, name: str) -> Tensor:
    """The operations of the training's losses (`pretrain.training.loss`), of which only the sizes matter here."""
    micro, classes = logits.shape
    if name == "sigmoid":
        targets = torch.zeros(micro, classes + 1, dtype=torch.float32).scatter_(1, labels, 1.0)[:, :classes] * 1.0 + 0.0
        rows = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").sum(dim=1)
    else:
        rows = F.cross_entropy(logits.float(), labels[:, 0], reduction="none")
    return (rows * valid).sum() / micro


def _fuse_dropout(model: nn.Module) -> None:
    """Dropout as accelerators compute it: they keep a mask of bytes, the CPU one in the type of the activations."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            share = module.p
            module.forward = lambda x, share=share: torch.native_dropout(x, share, True)[0]  # type: ignore[method-assign,misc]


def _fuse_attention(model: VisionTransformer) -> None:
    """Attention by one kernel, as every device computes it; the meta device has none, so torch would take it apart."""
    for block in model.blocks:
        attention: Any = block.attention

        def forward(*inputs: Any, inner: Any = attention.forward) -> Tensor:
            # Here and not around the trace: a backward pass leaves such a mode, but may compute this again.
            with _FusedAttention():
                return inner(*inputs)

        attention.forward = forward


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before: Any = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
