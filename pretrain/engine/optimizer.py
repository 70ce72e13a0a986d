"""AdamW and SGD with a weight-decay mask, updates that can be held back, and a Polyak average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.checkpoint.pieces import AVERAGE
from pretrain.engine.section import OptimizerSection

# Of two axes or more, but no matrix of a linear map: not decayed under "matrices".
_TOKENS = ("class_token", "position_embedding")


def parameter_groups(model: nn.Module, weight_decay: float, decay: Literal["matrices", "all"]) -> list[dict[str, Any]]:
    """The parameters as at most two groups: decayed and not.

    The paper does not say what it decays. "matrices" (kernels only: no bias, norm, class token or position
    embedding) is the choice of its authors' later code; "all" decays every parameter.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in _TOKENS
            (decayed if matrix or decay == "all" else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]  # DeepSpeed drops an empty group, which shifts the others


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
        averages: whether an average is kept.
    """

    hold = False
    decay: float | None = None
    updates = 0
    moments: tuple[str, ...] = ()
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
            state.setdefault(moment, torch.zeros_like(weights))
        if self.averages:
            state.setdefault(AVERAGE, weights.detach().clone())

    def set_updates(self, updates: int) -> None:
        """Set the number of updates made, as a checkpoint has it."""
        self.updates = updates

    @torch.no_grad()
    def _average(self) -> None:
        for group in self.param_groups:
            for weights in group["params"]:
                if self.averages and weights.grad is not None:
                    assert self.decay is not None
                    self.state[weights][AVERAGE].lerp_(weights, 1.0 - self.decay)


class AdamW(_Foundry, torch.optim.AdamW):
    """torch's fused AdamW: one pass over memory, no temporaries the size of the model, no compiler."""

    moments = ("exp_avg", "exp_avg_sq")

    def allocate(self, weights: Tensor) -> None:
        self.state[weights].setdefault("step", torch.zeros((), dtype=torch.float32, device=weights.device))
        super().allocate(weights)

    def set_updates(self, updates: int) -> None:
        super().set_updates(updates)
        for state in self.state.values():
            state["step"].fill_(updates)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if not self.hold:
            torch.optim.AdamW.step(self, closure)
            self._average()


class SGD(_Foundry, torch.optim.SGD):
    """torch's SGD with momentum."""

    moments: tuple[str, ...] = ("momentum_buffer",)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if not self.hold:
            torch.optim.SGD.step(self, closure)
            self._average()


def build_optimizer(model: nn.Module, section: OptimizerSection) -> AdamW | SGD:
    """The optimizer that the section names; it keeps a Polyak average where the section has one."""
    groups = parameter_groups(model, section.weight_decay, section.decay)
    optimizer: AdamW | SGD
    if section.name == "adamw":
        optimizer = AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
    else:
        optimizer = SGD(groups, lr=section.lr, momentum=section.momentum)
        if not section.momentum:
            optimizer.moments = ()
    optimizer.averages = section.averaging is not None
    return optimizer
