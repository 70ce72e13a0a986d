"""DeepSpeed around a model: the precision, the ZeRO stage."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from pretrain.checkpoint.pieces import WEIGHT
from pretrain.engine.fragments import allocate_states, check_names, held
from pretrain.engine.layout import Layout
from pretrain.engine.quiet import (
    FWD_MODULE_STACK,
    DeepSpeedConfigError,
    PartitionedParameterCoordinator,
    deepspeed,
    get_accelerator,
    quiet,
)
from pretrain.engine.section import DeepSpeedSection
from pretrain.engine.zero.once import hold_once
from pretrain.errors import InputError
from pretrain.model.block import Block

_BLOCK = f"{Block.__module__}.{Block.__qualname__}"


def precision(section: DeepSpeedSection) -> torch.dtype:
    """The type that the network computes in under a `deepspeed` section.

    `bf16.enabled` may be "auto": true on an accelerator that has bf16, false on the CPU, where it is slower than fp32.

    Raises:
        InputError: the device of this run does not support it.
    """
    accelerator = get_accelerator()
    device = accelerator.device_name()
    bf16, fp16 = section.bf16.enabled, section.fp16.enabled
    if bf16 == "auto":
        bf16 = device != "cpu" and accelerator.is_bf16_supported()
    if bf16 and not accelerator.is_bf16_supported():
        raise InputError(
            f"deepspeed.bf16.enabled: this {device} device has no bf16; set deepspeed.fp16.enabled, or neither for fp32"
        )
    if fp16 and not accelerator.is_fp16_supported():
        raise InputError(
            f"deepspeed.fp16.enabled: this {device} device has no fp16; set deepspeed.bf16.enabled, or neither for fp32"
        )
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32


def deepspeed_config(section: DeepSpeedSection, layout: Layout, clip_norm: float) -> dict[str, Any]:
    """The `deepspeed` section, plus what the other config keys set and what must hold in every run."""
    dtype, given = precision(section), section.model_dump()
    config = {
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_force_ds_cpu_optimizer": False,  # offloaded, torch's fused optimizers update on the CPU as fast
        "steps_per_print": 2**31 - 1,  # the progress line is ours
        **given,
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": clip_norm,  # always set: left out, DeepSpeed 0.19.8 clips at 1
    }
    if stage := section.stage:
        # DeepSpeed allocates the whole bucket anew for every backward pass; its default is 2 GB of fp32.
        ours: dict[str, Any] = {"reduce_bucket_size": 50_000_000}
        if stage < 3:
            # Both reduce a whole bucket on all ranks; "scatter" copies it once more (7 % of a backward pass on CPUs).
            ours["reduce_scatter"] = False
        else:
            # A block's parameters are gathered together: there are no hooks within it, so it can be compiled or
            # recomputed as a whole. DeepSpeed's own linear layer rounds twice in half precision; the network has one.
            ours |= {"leaf_module": {"classes": [_BLOCK]}, "memory_efficient_linear": False}
        config["zero_optimization"] = {**ours, **given["zero_optimization"]}
    if "bf16" in given:
        config["bf16"] = {**given["bf16"], "enabled": dtype is torch.bfloat16}
    if dtype is torch.bfloat16:
        config["bf16"]["check_grad_overflow"] = True  # a gradient that is not finite must not reach the weights
    if dtype is not torch.float32:
        # DeepSpeed would sum micro-batches and ranks in half precision, and the result would depend on how a batch is
        # divided. Also without accumulation: the choice determines the optimizer's state, and a resumed run may divide
        # its batch differently.
        config["data_types"] = {**given.get("data_types", {}), "grad_accum_dtype": "fp32"}
        config.setdefault("communication_data_type", "fp32")
    return config


def build_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    section: DeepSpeedSection,
    layout: Layout,
    clip_norm: float,
) -> Any:
    """A DeepSpeedEngine that trains `model`, whose parameters are set, the same on every rank. Collective.

    Raises:
        InputError: DeepSpeed refuses the section, or does not keep the weights where it records them.
    """
    config = deepspeed_config(section, layout, clip_norm)
    given = {}
    if precision(section) is not torch.float32:  # DeepSpeed would take its fp32 weights from rounded ones
        given = {name: parameter.detach().clone().view(-1) for name, parameter in model.named_parameters()}
    try:
        with quiet():
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except (ValidationError, DeepSpeedConfigError) as error:
        raise InputError(f"deepspeed: DeepSpeed refuses this section of the config: {error}") from None
    hold_once(engine)
    check_names(engine)  # before the next lines, which rely on the names
    for part in held(engine) if given else ():
        part.view(engine.basic_optimizer, WEIGHT).copy_(given[part.name][part.begin : part.begin + part.numel])
    allocate_states(engine)
    return engine


def release(engine: Any) -> None:
    """Let go of an engine, which is not used again: `free_memory` then frees what it held. Not collective.

    DeepSpeed keeps an engine of ZeRO 3 in a list and in a cache of its own, and all others in hooks of the parameters.
    """
    engine.destroy()
    FWD_MODULE_STACK.clear()
    # The cache is the class's, for coordinators and modules, behind a decorator that names no way to it.
    cached = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for found in inspect.getclosurevars(cached).nonlocals.values() if inspect.isfunction(cached) else ():
        getattr(found, "cache_clear", lambda: None)()


def free_memory() -> None:
    """Free the memory of engines that were released and are not referred to any more. Not collective."""
    gc.unfreeze()  # a run freezes what is there when it begins, so that no collection walks it
    gc.collect()
    get_accelerator().empty_cache()
