"""The norm of a step's gradients: computed on the device before the update, and handed to DeepSpeed from the host.

DeepSpeed 0.19.8 reads norms and overflow flags while it updates, and what it leaves behind can only be read once the
update is done. Each time the host waits for the device, and the device then for the host. Where a step reads the norm
beside its loss, the host has all it needs, and the device is given the update and the next step without a wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.engine.quiet import BF16_Optimizer, bf16_optimizer, combine_grad_norm_groups


@torch.no_grad()
def gradient_norm(engine: Any) -> Tensor | None:
    """The global norm of the step's gradients before clipping, as DeepSpeed computes it: a scalar on the device.

    It is not finite if a gradient is not. Under loss scaling it is that of the scaled gradients. To be called between
    the last backward pass and the update. None where the optimizer is on the host, where DeepSpeed reads the norms of
    single gradients. Collective.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        # After backward the gradients are averaged over the ranks.
        return nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        return None
    if isinstance(zero, BF16_Optimizer):  # every rank has all gradients
        gradients, _ = zero.get_grads_for_norm()
        return torch.stack([gradient.norm(2) for gradient in gradients]).pow(2).sum().pow(0.5)
    parts = zero.fp16_groups if stage == 3 else zero.params_in_partition
    squares = [_square(zero.averaged_gradients[index], len(part)) for index, part in enumerate(parts)]
    norms = []
    for square in squares:
        total = (square if stage == 3 else square.float()).to(engine.device)
        dist.all_reduce(total, group=zero.dp_process_group)
        norms.append(total.pow(0.5))
    combined: Tensor = combine_grad_norm_groups(norms)
    return combined


def _square(gradients: Iterable[Tensor], count: int) -> Tensor:
    """The squared norm of a group's gradients, summed in fp64, without what fills the group up."""
    real = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)][:count]
    if not real:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in real]).pow(2).sum()


@contextmanager
def known(engine: Any, norm: float) -> Iterator[None]:
    """Inside, DeepSpeed's step takes the `gradient_norm` that the host has read, and decides by it."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    value = _on_host(norm, torch.float64 if stage == 3 else torch.float32)
    instead: dict[str, Any]
    if stage == 0:
        place, instead = zero, {}
    elif isinstance(zero, BF16_Optimizer):
        place, instead = bf16_optimizer, {"get_global_norm_of_tensors": lambda **_: value}
    elif stage == 3:
        place, instead = zero, {"_get_norm_groups": lambda: [value]}
    else:
        place, instead = zero, {"scaled_global_norm": lambda: value}
    if place is zero and stage > 0:
        instead["check_overflow"] = lambda **_: None  # a gradient that is not finite makes the norm so
    before = {name: vars(place)[name] for name in instead if name in vars(place)}
    try:
        for name, function in instead.items():
            setattr(place, name, function)
        yield
    finally:
        for name in instead:
            if name in before:
                setattr(place, name, before[name])
            else:
                delattr(place, name)


def _on_host(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)
