"""What of a `deepspeed` section this project offers. What DeepSpeed cannot do, or would do otherwise, has a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.errors import nearest

_OBJECTS = ("zero_optimization", "bf16", "fp16", "data_types")

# What is reported, and when: of no effect on what is computed.
LOGGING = (
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger",
    "tensorboard", "wandb", "csv_monitor", "comet",
)  # fmt: skip
# Keys that may say one thing only, and why.
FIXED = {
    "zero_allow_untested_optimizer": (True, "the optimizer is torch's, none of those that DeepSpeed has tested"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is torch's, with offload too, and would be refused"),
}
# What decides what is computed, where it lies, and what is reported. DeepSpeed passes over a key it does not know.
_KEYS = (*_OBJECTS, "communication_data_type", *FIXED, *LOGGING)
_ZERO_KEYS = (
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "offload_param", "offload_optimizer",
    "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential", "ignore_unused_parameters", "log_trace_cache_warnings", "enable_sanity_checks",
)  # fmt: skip

# Keys of zero_optimization that are not offered, and why.
_REFUSED = {
    "cpu_offload": 'say offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'say offload_param: {"device": "cpu"}',
    "zenflow": "it updates the weights by another rule than the optimizer of this config; leave it out",
    "legacy_stage1": "DeepSpeed has removed it; leave it out",
    "elastic_checkpoint": "checkpoints go on at any number of ranks as they are; leave it out",
    "zero_quantized_weights": "what is communicated is not rounded; leave it out",
    "zero_quantized_nontrainable_weights": "what is communicated is not rounded; leave it out",
    "zero_quantized_gradients": "what is communicated is not rounded; leave it out",
    "round_robin_gradients": (
        "with it DeepSpeed takes the parts of the weights for parts of others, and checkpoints would mix them up; "
        "leave it out"
    ),
    "stage3_module_granularity_threshold": (
        "a block is gathered as a whole without it, and where more is, DeepSpeed's backward pass fails; leave it out"
    ),
}
# Keys of offload_optimizer and offload_param that have other optimizers or files behind them.
_OFFLOAD = ("device", "pin_memory")
_HALF_MASTERS = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")


def check_offered(section: dict[str, Any]) -> None:
    """Refuse what cannot be, before anything is built.

    Raises:
        ValueError: naming the key below `deepspeed`, what was found and what would be right.
    """
    for key in _OBJECTS:
        if not isinstance(section.get(key, {}), dict):
            raise ValueError(f"{key} must be an object, as in DeepSpeed's documentation, found {section[key]!r}")
    zero = section.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}")
    for key, instead in _REFUSED.items():
        if zero.get(key):
            raise ValueError(f"zero_optimization.{key} is not offered: {instead}")
    for key, (right, why) in FIXED.items():
        if section.get(key, right) is not right:
            raise ValueError(f"{key} must be {str(right).lower()}, or left out, found {section[key]!r}: {why}")
    _check_known(section, _KEYS, "")
    _check_known(zero, (*_ZERO_KEYS, *_REFUSED), "zero_optimization.")
    _check_precision(section, stage)
    _check_offload(zero, stage)


def _check_known(said: dict[str, Any], known: Sequence[str], below: str) -> None:
    for key in said:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {below}{near}?" if near else f"what is: {', '.join(known)}"
            raise ValueError(f"{below}{key} is not offered; {hint}")


def _check_precision(section: dict[str, Any], stage: int) -> None:
    chosen = []
    for name, choices in (("bf16", 'true, false or "auto"'), ("fp16", "true or false")):
        said = section.get(name, {})
        enabled = said.get("enabled", False)
        if not (isinstance(enabled, bool) or (name == "bf16" and enabled == "auto")):
            raise ValueError(f"{name}.enabled must be {choices}, found {enabled!r}")
        if not enabled:
            continue
        chosen.append(name)
        if stage == 0:
            raise ValueError(
                f"{name} keeps its fp32 weights in ZeRO's partitions: set zero_optimization.stage to 1, 2 or 3"
            )
        for key in _HALF_MASTERS:
            if said.get(key):
                raise ValueError(f"{name}.{key} is not offered: weights and optimizer are kept in fp32; leave it out")
        if said.get("check_grad_overflow", True) is not True:
            raise ValueError(
                f"{name}.check_grad_overflow must be true: an update with a gradient that is not finite must be skipped"
            )
    if len(chosen) > 1:
        raise ValueError("bf16 and fp16 are both enabled: keep bf16 where the device has it, fp16 on an older one")
    accumulated = section.get("data_types", {}).get("grad_accum_dtype", "fp32")
    if accumulated not in ("fp32", "float32", "float"):
        raise ValueError(f'data_types.grad_accum_dtype must be "fp32", or left out, found {accumulated!r}')


def _check_offload(zero: dict[str, Any], stage: int) -> None:
    least = {"offload_optimizer": 1, "offload_param": 3}
    offloaded = {}
    for name, lowest in least.items():
        said = zero.get(name)
        if said is None:
            continue
        if not isinstance(said, dict):
            raise ValueError(f'zero_optimization.{name} must be an object, as in {{"device": "cpu"}}, found {said!r}')
        device = said.get("device", "none")
        if device == "nvme":
            raise ValueError(
                f"zero_optimization.{name}.device: nvme is not offered: checkpoints, averaged weights and fingerprints "
                'are taken from memory; set "cpu"'
            )
        if device not in ("cpu", "none"):
            raise ValueError(f'zero_optimization.{name}.device must be "cpu" or "none", found {device!r}')
        for key in said:
            if key not in _OFFLOAD:
                raise ValueError(f"zero_optimization.{name}.{key} is not offered: leave all but {', '.join(_OFFLOAD)}")
        offloaded[name] = device == "cpu"
        if offloaded[name] and stage < lowest:
            stages = "1, 2 or 3" if lowest == 1 else "3"
            raise ValueError(
                f"zero_optimization.{name} needs the {'optimizer' if lowest == 1 else 'parameters'} partitioned: set "
                f"zero_optimization.stage to {stages}, found {stage}"
            )
    if offloaded.get("offload_param") and not offloaded.get("offload_optimizer"):
        raise ValueError(
            "zero_optimization.offload_param goes with the optimizer: set zero_optimization.offload_optimizer to "
            '{"device": "cpu"} too'
        )
