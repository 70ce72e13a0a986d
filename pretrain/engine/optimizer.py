"""AdamW and SGD over the network's parameters, with the weight-decay mask."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

# Two axes or more, but no matrices of a linear map: never decayed under "matrices".
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


def build_optimizer(
    model: nn.Module,
    *,
    name: Literal["adamw", "sgd"],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    weight_decay: float,
    decay: Literal["matrices", "all"],
) -> torch.optim.Optimizer:
    """torch's own AdamW (pre-training, Table 3) or SGD with momentum (fine-tuning, Table 4)."""
    groups = parameter_groups(model, weight_decay, decay)
    if name == "adamw":
        # Fused: one pass over memory and no temporaries the size of the model; needs no compiler.
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give every group of a torch optimizer, or of DeepSpeed's wrapper around one, the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
