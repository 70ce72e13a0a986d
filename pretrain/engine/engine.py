"""DeepSpeed around a model: the batch layout, the precision, the ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from pretrain.engine.distributed import World
from pretrain.engine.quiet import DeepSpeedConfigError, deepspeed, get_accelerator, quiet
from pretrain.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How a global batch is cut: ranks × accumulation × micro-batch."""

    global_batch: int
    micro_batch: int
    accumulation: int
    ranks: int

    @property
    def per_rank(self) -> int:
        """Images of a step that one rank trains on."""
        return self.micro_batch * self.accumulation


def batch_layout(global_batch: int, micro_batch: int | None, ranks: int) -> Layout:
    """Cut `global_batch` into equal micro-batches; without `micro_batch` a rank takes its share at once.

    Raises:
        InputError: the batch does not divide; the message names the nearest batches that do.
    """
    unit = ranks * (micro_batch or 1)
    if global_batch % unit:
        below, above = global_batch // unit * unit, (global_batch // unit + 1) * unit
        right = f"{below} or {above}" if below else f"{above}"
        by = f"{ranks} ranks × train.micro_batch {micro_batch}" if micro_batch else f"{ranks} ranks"
        raise InputError(
            f"train.global_batch: {global_batch} does not divide among {by}; {right} would"
            + (", or another train.micro_batch" if micro_batch else "")
        )
    micro = micro_batch or global_batch // ranks
    return Layout(global_batch, micro, global_batch // (ranks * micro), ranks)


def precision(section: dict[str, Any]) -> torch.dtype:
    """The type a `deepspeed` section makes the network compute in.

    `bf16.enabled` may be "auto": true on an accelerator that has bf16, false on the CPU, where it is slower than fp32.
    """
    enabled = section.get("bf16", {}).get("enabled", False)
    if enabled == "auto":
        accelerator = get_accelerator()
        enabled = accelerator.device_name() != "cpu" and accelerator.is_bf16_supported()
    return torch.bfloat16 if enabled else torch.float32


def zero_stage(section: dict[str, Any]) -> int:
    """The ZeRO stage of a `deepspeed` section."""
    return int(section.get("zero_optimization", {}).get("stage", 0))


def deepspeed_config(section: dict[str, Any], layout: Layout, clip_norm: float) -> dict[str, Any]:
    """The `deepspeed` section as it stands, plus what our other keys say."""
    dtype = precision(section)
    config = {
        "zero_allow_untested_optimizer": True,  # SGD
        "steps_per_print": 2**31 - 1,  # the progress line is ours
        **section,
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": clip_norm,  # always said: left out, DeepSpeed 0.19.8 clips at 1
    }
    if "bf16" in section:
        config["bf16"] = {**section["bf16"], "enabled": dtype is torch.bfloat16}
    if dtype is torch.bfloat16:
        # DeepSpeed would add up micro-batches in bf16, and the result would hang on how a batch is cut. Also without
        # accumulation: the choice decides the optimizer's state, and a resumed run may cut its batch another way.
        config["data_types"] = {"grad_accum_dtype": "fp32", **section.get("data_types", {})}
    return config


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    section: dict[str, Any],
    layout: Layout,
    clip_norm: float,
) -> Any:
    """A DeepSpeedEngine that trains `model`, whose parameters are filled and the same on every rank."""
    config = deepspeed_config(section, layout, clip_norm)
    try:
        with quiet():
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except (ValidationError, DeepSpeedConfigError) as error:
        raise InputError(f"deepspeed: DeepSpeed refuses this section of the config: {error}") from None
    return engine


def seed_step(seed: int, step: int, world: World) -> None:
    """Make what torch draws in a step (dropout masks) a function of (seed, step, rank): no random state to save."""
    # Distinct for every step and rank of a run, and 64 bits wide as torch wants it.
    torch.manual_seed((seed * 1_000_003 + step) * 100_003 + world.rank & (2**63 - 1))


def take_step(engine: Any) -> float | None:
    """Let the engine count the micro-batch and, with the last of a step, update the parameters.

    Returns the global gradient norm before clipping where an update was made, else None.
    """
    updates = engine.is_gradient_accumulation_boundary()
    norm = None
    if updates and engine.zero_optimization_stage() == 0:
        # DeepSpeed does not tell the norm in this mode; after backward the gradients are whole and averaged.
        norm = nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    if not updates:
        return None
    return float(engine.get_global_grad_norm() if norm is None else norm)
