"""AdamW and SGD with a weight-decay mask, updates that can be held back, and a Polyak average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.checkpoint.pieces import AVERAGE
from pretrain.engine.section import OptimizerSection
from pretrain.model.depth import depth_of
from pretrain.model.vit import VisionTransformer

# Of two axes or more, but no matrix of a linear map: not decayed under "matrices".
_TOKENS = ("class_token", "position_embedding")

_CHUNK = 1 << 20  # values updated at a time


def parameter_groups(
    model: VisionTransformer, weight_decay: float, decay: Literal["matrices", "all"], layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """The parameters in groups: decayed and not, and of each layer where learning rates differ.

    The paper does not say what it decays. "matrices" (kernels only: no bias, norm, class token or position
    embedding) is the choice of its authors' later code; "all" decays every parameter.

    `lr_scale` is what the schedule's learning rate is multiplied by. With `layer_decay` d, in a network of L blocks, it
    is 1 for head and final norm, d^(L+1-i) for the i-th block (from 1) and d^(L+1) for the embedding, as in BEiT
    (arXiv:2106.08254) and MAE. It is 0 in the group of what is frozen: that one is not updated.
    """
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    layers = model.spec.layers
    for name, parameter in model.named_parameters():
        depth = depth_of(name, layers)
        matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in _TOKENS
        key = (matrix or decay == "all", (layer_decay or 1.0) ** max(layers + 1 - depth, 0))
        found.setdefault(key if depth >= model.frozen else (False, 0.0), []).append(parameter)
    return [
        {"params": found[decayed, scale], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for decayed, scale in sorted(found, reverse=True)
    ]


class _Foundry:
    """What this project's optimizers add to torch's. DeepSpeed sees a torch optimizer.

    The Polyak average, average ← decay · average + (1 − decay) · weights after each update in fp32, is a state of the
    optimizer like the moments, so it is partitioned as they are.

    Attributes:
        hold: whether `step` leaves weights and state as they are.
        decay: of the average at the next update; None where no average is kept.
        updates: made since the run began. The caller counts them: DeepSpeed calls `step` once for every part of the
            weights.
        moments: the names of the states that torch's update keeps.
        moment_dtype: what they are stored in.
        averages: whether an average is kept.
    """

    hold = False
    decay: float | None = None
    updates = 0
    moments: tuple[str, ...] = ()
    moment_dtype = torch.float32
    averages = False
    state: Any
    param_groups: list[dict[str, Any]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the states that are tensors like the weights."""
        return (*self.moments, AVERAGE) if self.averages else self.moments

    def allocate(self, weights: Tensor) -> None:
        """Allocate the states of `weights` now: memory that is short shows before there is anything to lose."""
        state = self.state[weights]
        for moment in self.moments:
            state.setdefault(moment, torch.zeros_like(weights, dtype=self.moment_dtype))
        if self.averages:
            state.setdefault(AVERAGE, weights.detach().clone())

    def set_updates(self, updates: int) -> None:
        """Set the number of updates made, as a checkpoint has it."""
        self.updates = updates

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the weights of all groups but the frozen one, and their average; nothing while `hold` is set."""
        if self.hold:
            return
        groups = self.param_groups
        self.param_groups = [group for group in groups if group.get("lr_scale", 1.0)]
        try:
            self.update_weights()
            self._average()
        finally:
            self.param_groups = groups

    def update_weights(self) -> None:
        """Update the weights of `param_groups` that have a gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def _average(self) -> None:
        for group in self.param_groups:
            for weights in group["params"]:
                if self.averages and weights.grad is not None:
                    assert self.decay is not None
                    self.state[weights][AVERAGE].lerp_(weights, 1.0 - self.decay)


class AdamW(_Foundry, torch.optim.AdamW):  # type: ignore[misc]
    """torch's fused AdamW: one pass over memory, no temporaries the size of the model, no compiler."""

    moments = ("exp_avg", "exp_avg_sq")

    def allocate(self, weights: Tensor) -> None:
        self.state[weights].setdefault("step", torch.zeros((), dtype=torch.float32, device=weights.device))
        super().allocate(weights)

    def set_updates(self, updates: int) -> None:
        super().set_updates(updates)
        for state in self.state.values():
            state["step"].fill_(updates)

    def update_weights(self) -> None:
        torch.optim.AdamW.step(self)


class SGD(_Foundry, torch.optim.SGD):  # type: ignore[misc]
    """torch's SGD with momentum."""

    moments: tuple[str, ...] = ("momentum_buffer",)

    def update_weights(self) -> None:
        torch.optim.SGD.step(self)


class HalfMomentumSGD(SGD):
    """SGD whose momentum is stored in bfloat16, as by the paper's authors. The update itself is computed in fp32.

    velocity = momentum · stored + gradient; weights ← weights − lr · velocity; stored ← velocity, rounded.
    torch's own would round twice, and move the weights by the rounded velocity.
    """

    moment_dtype = torch.bfloat16

    @torch.no_grad()
    def update_weights(self) -> None:
        for group in self.param_groups:
            for weights in (weights for weights in group["params"] if weights.grad is not None):
                tensors = (weights, weights.grad, self.state[weights]["momentum_buffer"])
                for values, gradient, stored in zip(*(t.view(-1).split(_CHUNK) for t in tensors), strict=True):
                    velocity = stored.float().mul_(group["momentum"]).add_(gradient)
                    velocity.add_(values, alpha=group["weight_decay"])
                    values.add_(velocity, alpha=-group["lr"])
                    stored.copy_(velocity)


def build_optimizer(model: VisionTransformer, section: OptimizerSection) -> AdamW | SGD:
    """The optimizer that the section names; it keeps a Polyak average where the section has one."""
    groups = parameter_groups(model, section.weight_decay, section.decay, section.layer_decay)
    optimizer: AdamW | SGD
    if section.name == "adamw":
        optimizer = AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
    else:
        kind = HalfMomentumSGD if section.momentum_dtype == "bfloat16" else SGD
        optimizer = kind(groups, lr=section.lr, momentum=section.momentum)
        if not section.momentum:
            optimizer.moments = ()
    optimizer.averages = section.averaging is not None
    return optimizer
