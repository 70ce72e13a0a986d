"""The config sections `optimizer` and `deepspeed`."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from pretrain.engine.schedule import AveragingSection
from pretrain.section import Section, key

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW (pre-training, Table 3) or SGD with momentum (fine-tuning, Table 4)."""

    name: Literal["adamw", "sgd"] = key("adamw", about="AdamW, or SGD with momentum.")
    lr: float = key(about="The learning rate at the end of the warm-up.", gt=0)
    betas: tuple[Beta, Beta] = key((0.9, 0.999), about="AdamW's decay of its two moments.")
    eps: float = key(1e-8, about="AdamW's addend to the denominator.", gt=0)
    momentum: float = key(0.9, about="SGD's momentum.", ge=0, lt=1)
    momentum_dtype: Literal["float32", "bfloat16"] = key(
        "float32", about="What SGD's momentum is stored in between updates; bfloat16 takes half the memory."
    )
    weight_decay: float = key(0.0, about="Decoupled weight decay with AdamW, L2 regularisation with SGD.", ge=0)
    decay: Literal["matrices", "all"] = key(
        "matrices",
        about="What is decayed: the kernels (no bias, norm, class token or position embedding), or all parameters.",
    )
    layer_decay: float | None = key(
        None,
        about="Layer-wise learning rates: a block's is this share of the next one's, the last one's of the head's; "
        "null: one for all.",
        gt=0,
        le=1,
    )
    clip_norm: float = key(1.0, about="Global norm that gradients are clipped to; 0: no clipping.", ge=0)
    averaging: AveragingSection | None = key(
        None,
        about="The Polyak average of the weights; null: none is kept.",
        resume="stated",
        examples=[{"decay": 0.9999}],
    )

    @model_validator(mode="after")
    def _has_momentum(self) -> OptimizerSection:
        if self.momentum_dtype != "float32" and not (self.name == "sgd" and self.momentum):
            raise ValueError(
                f'momentum_dtype is "{self.momentum_dtype}", but there is no momentum of SGD to store: set name to '
                '"sgd" and momentum above 0, or leave momentum_dtype out'
            )
        return self


class AsGiven(Section):
    """A section that hands on and records only the keys that were given."""

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


def _no_auto(section: dict[str, Any]) -> dict[str, Any]:
    for name, value in section.items():
        if value == "auto":
            raise ValueError(f'{name} is "auto"; the value itself would be right: DeepSpeed takes its own default')
        if isinstance(value, dict):
            _no_auto(value)
    return section


def _absent(value: Any) -> Any:
    if value not in (None, False):
        raise PydanticCustomError("not_offered", "not offered")
    return value


def _only(right: bool) -> AfterValidator:
    def check(value: bool) -> bool:
        if value is not right:
            raise ValueError(f"found {json.dumps(value)}; {json.dumps(right)} would be right, or leave it out")
        return value

    return AfterValidator(check)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=1, lt=2**63)]
Report = Annotated[dict[str, Any], AfterValidator(_no_auto)]  # as DeepSpeed's documentation has it
OnlyTrue = Annotated[bool, _only(True)]
OnlyFalse = Annotated[bool, _only(False)]
NotOffered = Annotated[Any, AfterValidator(_absent)]  # its sentence says why

# Where there is no default of ours, DeepSpeed's own holds. Keys that decide where state lies and when it is exchanged
# are free to change; those of precision, but for the choice itself, are not.
_free = partial(key, None, resume="free")
_fixed = partial(key, None)


class OffloadSection(AsGiven):
    """Where ZeRO keeps a part of the state."""

    device: Literal["cpu", "none"] = key(
        "none", about="The host's memory or the device's; checkpoints are not taken from nvme.", resume="free"
    )
    pin_memory: bool = _free(about="Whether the host's memory is page-locked.")


class ZeroSection(AsGiven):
    """What is partitioned among the ranks, and when it is exchanged."""

    stage: int = key(
        0,
        about="What is partitioned: 1 the optimizer's state, 2 gradients too, 3 parameters too.",
        resume="free",
        ge=0,
        le=3,
    )
    offload_optimizer: OffloadSection | None = _free(
        about="Where the optimizer's state lies, from stage 1 on.", examples=[{"device": "cpu"}]
    )
    offload_param: OffloadSection | None = _free(
        about="Where the parameters lie, at stage 3.", examples=[{"device": "cpu"}]
    )
    overlap_comm: bool | None = _free(about="Whether gradients are reduced while others are computed.")
    contiguous_gradients: bool = _free(about="Whether gradients are copied into one buffer as they appear.")
    reduce_scatter: bool = _free(about="Whether gradients are reduce-scattered; left out, not below stage 3.")
    use_multi_rank_bucket_allreduce: bool = _free(about="Whether one all-reduce serves the buckets of several ranks.")
    allgather_partitions: bool = _free(about="Whether updated parameters are all-gathered or broadcast.")
    stage3_gather_16bit_weights_on_model_save: bool = _free(about="Whether DeepSpeed's own model save gathers weights.")
    stage3_use_all_reduce_for_fetch_params: bool = _free(about="Whether parameters are fetched by all-reduce.")
    stage3_allgather_sequential: bool = _free(about="Whether parameters are gathered one after another.")
    ignore_unused_parameters: bool = _free(about="Whether parameters without a gradient are accepted.")
    log_trace_cache_warnings: bool = _free(about="Whether a changed order of modules is reported.")
    enable_sanity_checks: bool = _free(about="Whether DeepSpeed checks itself, which is slow.")
    reduce_bucket_size: Size = _free(about="Values reduced at once; left out, 50,000,000.")
    sub_group_size: Size = _free(about="Values updated at once, at stage 3.")
    allgather_bucket_size: int = _free(about="Values all-gathered at once.", ge=2, lt=2**63, multiple_of=2)
    stage3_prefetch_bucket_size: Count = _free(about="Values of parameters fetched ahead.")
    stage3_param_persistence_threshold: Count = _free(about="Parameters of fewer values are not partitioned.")
    stage3_model_persistence_threshold: Count = _free(about="The most values that are not partitioned.")
    stage3_max_live_parameters: Count = _free(about="The most values gathered at a time.")
    stage3_max_reuse_distance: Count = _free(about="Values until the next use within which a parameter is kept.")
    cpu_offload: NotOffered = _free(about='set offload_optimizer to {"device": "cpu"}')
    cpu_offload_param: NotOffered = _free(about='set offload_param to {"device": "cpu"}')
    zenflow: NotOffered = _free(about="it updates weights by another rule than the optimizer; leave it out")
    legacy_stage1: NotOffered = _free(about="DeepSpeed has removed it; leave it out")
    elastic_checkpoint: NotOffered = _free(about="checkpoints resume at any number of ranks; leave it out")
    zero_quantized_weights: NotOffered = _free(about="what is communicated is not rounded; leave it out")
    zero_quantized_nontrainable_weights: NotOffered = _free(about="what is communicated is not rounded; leave it out")
    zero_quantized_gradients: NotOffered = _free(about="what is communicated is not rounded; leave it out")
    round_robin_gradients: NotOffered = _free(
        about="DeepSpeed confuses the parts of the weights, and checkpoints would mix them up; leave it out"
    )
    stage3_module_granularity_threshold: NotOffered = _free(
        about="DeepSpeed's backward pass fails where more than a block is gathered at once; leave it out"
    )


class Bf16Section(AsGiven):
    """Training in bfloat16, with weights and optimizer in fp32. Which precision a run has is `precision` on resume."""

    enabled: bool | Literal["auto"] = key(
        False, about='Compute in bfloat16; "auto": on an accelerator that has it.', resume="free"
    )
    immediate_grad_update: bool = _free(about="Whether gradients are added in fp32 as soon as they are there.")
    check_grad_overflow: bool = _free(about="Must be true: an update with a gradient that is not finite is skipped.")
    bf16_master_weights_and_grads: bool = _free(about="Must be false: weights are kept in fp32.")
    bf16_optimizer_states: bool = _free(about="Must be false: the optimizer's state is kept in fp32.")


class Fp16Section(AsGiven):
    """Training in float16 with a loss scale, for devices without bfloat16."""

    enabled: bool = key(False, about="Compute in float16.")
    auto_cast: bool = _fixed(about="Whether inputs are cast to float16.")
    loss_scale: Count = _fixed(about="The loss scale; 0: dynamic.")
    initial_scale_power: Count = _fixed(about="The dynamic loss scale starts at two to this power.")
    loss_scale_window: Size = _fixed(about="Updates without overflow after which the scale doubles.")
    hysteresis: Size = _fixed(about="Overflows before the scale is halved.")
    consecutive_hysteresis: bool = _fixed(about="Whether an update without overflow restores the hysteresis.")
    min_loss_scale: Size = _fixed(about="The least loss scale.")
    fp16_master_weights_and_grads: bool = _fixed(about="Must be false: weights are kept in fp32.")


class DataTypesSection(AsGiven):
    """What gradients are added up in."""

    grad_accum_dtype: Literal["fp32", "float32", "float"] = _fixed(about="Type that micro-batches are added up in.")


# Of bf16 and fp16.
_HALF_STATE = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")
# Keys of a DeepSpeed config that other keys of ours already say.
_SAID_ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
}


class DeepSpeedSection(AsGiven):
    """What DeepSpeed is told besides what other keys say: what lies where, the precision, what it reports.

    DeepSpeed ignores a key it does not know, takes its own default for "auto", and converts values of another type:
    here all of them are refused.
    """

    zero_optimization: ZeroSection = key(
        ZeroSection(), about="ZeRO: what is partitioned among ranks.", resume="free", examples=[{"stage": 1}]
    )
    bf16: Bf16Section = key(Bf16Section(), about="Training in bfloat16.", resume="free")
    fp16: Fp16Section = key(Fp16Section(), about="Training in float16.")
    data_types: DataTypesSection = key(DataTypesSection(), about="What gradients are added up in.")
    communication_data_type: Literal["fp32", "bf16", "fp16"] = _fixed(about="Type that gradients are exchanged in.")
    zero_allow_untested_optimizer: OnlyTrue = _free(about="Must be true: the optimizer is torch's.")
    zero_force_ds_cpu_optimizer: OnlyFalse = _free(about="Must be false: the optimizer is torch's.")
    steps_per_print: Size = _free(about="Steps between DeepSpeed's own progress lines; left out, none.")
    wall_clock_breakdown: bool = _free(about="Whether DeepSpeed reports the time of each part of a step.")
    memory_breakdown: bool = _free(about="Whether DeepSpeed reports memory.")
    dump_state: bool = _free(about="Whether DeepSpeed prints its state at the start.")
    flops_profiler: Report = _free(about="DeepSpeed's profiler.")
    comms_logger: Report = _free(about="DeepSpeed's log of its communication.")
    tensorboard: Report = _free(about="DeepSpeed's own TensorBoard files.")
    wandb: Report = _free(about="DeepSpeed's monitor for Weights & Biases.")
    csv_monitor: Report = _free(about="DeepSpeed's monitor for CSV files.")
    comet: Report = _free(about="DeepSpeed's monitor for Comet.")

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.zero_optimization.stage

    @model_validator(mode="before")
    @classmethod
    def _not_said_twice(cls, section: Any) -> Any:
        for name, ours in _SAID_ELSEWHERE.items():
            if isinstance(section, dict) and name in section:
                raise ValueError(f"{name} follows from {ours}: set that and leave deepspeed.{name} out")
        return section

    @model_validator(mode="after")
    def _possible(self) -> DeepSpeedSection:
        zero, stage = self.zero_optimization, self.stage
        for name, half in (("bf16", self.bf16), ("fp16", self.fp16)):
            if half.enabled and stage == 0:
                raise ValueError(
                    f"{name} keeps its fp32 weights in ZeRO's partitions: set zero_optimization.stage to 1, 2 or 3"
                )
            for state in _HALF_STATE:
                if half.enabled and getattr(half, state, None):
                    raise ValueError(
                        f"{name}.{state} is not offered: weights and optimizer are kept in fp32; leave it out"
                    )
        if self.bf16.enabled and self.fp16.enabled:
            raise ValueError("bf16 and fp16 are both enabled: keep bf16 where the device has it, fp16 on an older one")
        if self.bf16.enabled and self.bf16.check_grad_overflow is False:
            raise ValueError(
                "bf16.check_grad_overflow must be true: an update with a gradient that is not finite must be skipped"
            )
        optimizer, parameters = (
            part is not None and part.device == "cpu" for part in (zero.offload_optimizer, zero.offload_param)
        )
        if optimizer and stage < 1:
            raise ValueError(
                "zero_optimization.offload_optimizer needs the optimizer partitioned: set zero_optimization.stage to "
                f"1, 2 or 3, found {stage}"
            )
        if parameters and stage < 3:
            raise ValueError(
                "zero_optimization.offload_param needs the parameters partitioned: set zero_optimization.stage to 3, "
                f"found {stage}"
            )
        if parameters and not optimizer:
            raise ValueError(
                "zero_optimization.offload_param goes with the optimizer: set zero_optimization.offload_optimizer to "
                '{"device": "cpu"} too'
            )
        return self
