"""What of a `deepspeed` section this project offers. What DeepSpeed cannot do, or would do otherwise, has a name."""

from __future__ import annotations

import json
from typing import Any

from pretrain.errors import nearest

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
# What a key takes: one of some values, a whole number of a range, or an object; an empty one is left to DeepSpeed.
_FLAG = (True, False)
_COUNT, _SIZE, _EVEN = range(2**63), range(1, 2**63), range(2, 2**63, 2)
_OFFLOAD = {"device": ("cpu", "none"), "pin_memory": _FLAG}  # its other keys have other optimizers or files behind them
# What decides what is computed, where it lies, and what is reported. DeepSpeed passes over a key it does not know,
# takes its own default where "auto" stands, and converts what is of another type.
_OFFERED: dict[str, Any] = {
    "zero_optimization": {
        "stage": (0, 1, 2, 3),
        "offload_optimizer": _OFFLOAD,
        "offload_param": _OFFLOAD,
        "overlap_comm": (*_FLAG, None),
        **dict.fromkeys(
            (
                "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
                "stage3_gather_16bit_weights_on_model_save", "stage3_use_all_reduce_for_fetch_params",
                "stage3_allgather_sequential", "ignore_unused_parameters", "log_trace_cache_warnings",
                "enable_sanity_checks",
            ),
            _FLAG,
        ),
        **dict.fromkeys(("reduce_bucket_size", "sub_group_size"), _SIZE),
        "allgather_bucket_size": _EVEN,
        **dict.fromkeys(
            (
                "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
                "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
            ),
            _COUNT,
        ),
    },
    "bf16": {
        "enabled": (*_FLAG, "auto"),
        **dict.fromkeys(("immediate_grad_update", "check_grad_overflow"), _FLAG),
        **dict.fromkeys(("bf16_master_weights_and_grads", "bf16_optimizer_states"), _FLAG),
    },
    "fp16": {
        **dict.fromkeys(("enabled", "auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads"), _FLAG),
        **dict.fromkeys(("loss_scale", "initial_scale_power"), _COUNT),
        **dict.fromkeys(("loss_scale_window", "hysteresis", "min_loss_scale"), _SIZE),
    },
    "data_types": {"grad_accum_dtype": ("fp32", "float32", "float")},
    "communication_data_type": ("fp32", "bf16", "fp16"),
    **dict.fromkeys(FIXED, _FLAG),
    **{key: {} for key in LOGGING},
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), _FLAG),
    "steps_per_print": _SIZE,
}  # fmt: skip

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
_LEAST = {"offload_optimizer": 1, "offload_param": 3}  # the ZeRO stage that partitions what is offloaded
_HALF_MASTERS = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")


def check_offered(section: dict[str, Any]) -> None:
    """Refuse what cannot be, before anything is built.

    Raises:
        ValueError: naming the key below `deepspeed`, what was found and what would be right.
    """
    zero = section.get("zero_optimization", {})
    if isinstance(zero, dict):
        for key, instead in _REFUSED.items():
            if zero.get(key):
                raise ValueError(f"zero_optimization.{key} is not offered: {instead}")
        zero = {key: said for key, said in zero.items() if key not in _REFUSED and not (key in _LEAST and said is None)}
    for key, (right, why) in FIXED.items():
        if section.get(key, right) is not right:
            raise ValueError(f"{key} must be {str(right).lower()}, or left out, found {section[key]!r}: {why}")
    _check({**section, "zero_optimization": zero}, _OFFERED, "")
    stage = zero.get("stage", 0)
    _check_precision(section, stage)
    _check_offload(zero, stage)


def _check(said: dict[str, Any], offered: dict[str, Any], below: str) -> None:
    """Refuse keys that are not `offered`, and values that are not what they take."""
    for key, value in said.items():
        name = below + key
        if offered and key not in offered:
            near = nearest(key, offered)
            hint = f"did you mean {below}{near}?" if near else f"what is: {', '.join(offered)}"
            raise ValueError(f"{name} is not offered; {hint}")
        takes = offered.get(key)
        if takes is None:
            right, fits = 'what DeepSpeed\'s documentation says, not "auto"', value != "auto"
        elif isinstance(takes, dict):
            right, fits = "an object, as in DeepSpeed's documentation", isinstance(value, dict)
        elif isinstance(takes, range):
            right = f"{'an even' if takes.step == 2 else 'a'} whole number from {takes.start}"
            fits = type(value) is int and value in takes
        else:
            *words, last = map(json.dumps, takes)
            right = f"{', '.join(words)}{' or ' if words else ''}{last}"
            fits = any(type(value) is type(choice) and value == choice for choice in takes)
        if value == "nvme" and takes is _OFFLOAD["device"]:
            raise ValueError(
                f"{name}: nvme is not offered: checkpoints, averaged weights and fingerprints are taken from memory; "
                'set "cpu"'
            )
        if not fits:
            raise ValueError(f"{name} must be {right}, or left out, found {value!r}")
        if isinstance(value, dict):
            _check(value, takes or {}, f"{name}.")


def _check_precision(section: dict[str, Any], stage: int) -> None:
    chosen = []
    for name in ("bf16", "fp16"):
        said = section.get(name, {})
        if not said.get("enabled", False):
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


def _check_offload(zero: dict[str, Any], stage: int) -> None:
    offloaded = {}
    for name, lowest in _LEAST.items():
        offloaded[name] = zero.get(name, {}).get("device") == "cpu"
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
