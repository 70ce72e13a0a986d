"""What DeepSpeed has and cannot do here is refused by its name, with the reason."""

import json
import re

import pytest

from pretrain.engine.offered import check_offered
from pretrain.run.config import RunConfig
from pretrain.run.configfile import read_config

CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            r"^zero_optimization\.round_robin_gradients is not offered: .*checkpoints would mix them up; leave it out$",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000}},
            r"^zero_optimization\.stage3_module_granularity_threshold is not offered: .*backward pass fails; leave it",
        ),
        (
            {"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"stage": 1, "offload_optimizer": CPU}},
            r"^zero_force_ds_cpu_optimizer must be false, or left out, found True: the optimizer is torch's",
        ),
        (
            {"zero_allow_untested_optimizer": False, "zero_optimization": {"stage": 1}},
            r"^zero_allow_untested_optimizer must be true, or left out, found False: .*none of those .* tested",
        ),
    ],
)
def test_what_would_fail_or_do_harm_later_is_refused(section, words):
    with pytest.raises(ValueError, match=words):
        check_offered(section)


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("zero_optimization.reduce_bucket_size", "auto", "a whole number from 1"),
        ("zero_optimization.reduce_bucket_size", "5e8", "a whole number from 1"),
        ("zero_optimization.reduce_bucket_size", 0, "a whole number from 1"),
        ("zero_optimization.reduce_bucket_size", True, "a whole number from 1"),
        ("zero_optimization.reduce_bucket_size", 1.5, "a whole number from 1"),
        ("zero_optimization.reduce_bucket_size", None, "a whole number from 1"),
        ("zero_optimization.allgather_bucket_size", 5, "an even whole number from 2"),
        ("zero_optimization.sub_group_size", -1, "a whole number from 1"),
        ("zero_optimization.stage3_prefetch_bucket_size", "auto", "a whole number from 0"),
        ("zero_optimization.stage3_param_persistence_threshold", "auto", "a whole number from 0"),
        ("zero_optimization.stage3_max_live_parameters", -1, "a whole number from 0"),
        ("zero_optimization.overlap_comm", "auto", "true, false or null"),
        ("zero_optimization.contiguous_gradients", "true", "true or false"),
        ("zero_optimization.stage", "2", "0, 1, 2 or 3"),
        ("zero_optimization.offload_optimizer.device", "auto", '"cpu" or "none"'),
        ("zero_optimization.offload_optimizer.pin_memory", 1, "true or false"),
        ("fp16.enabled", "auto", "true or false"),
        ("fp16.loss_scale", "auto", "a whole number from 0"),
        ("fp16.min_loss_scale", 0, "a whole number from 1"),
        ("fp16.initial_scale_power", "16", "a whole number from 0"),
        ("bf16.immediate_grad_update", "no", "true or false"),
        ("data_types.grad_accum_dtype", "auto", '"fp32", "float32" or "float"'),
        ("communication_data_type", "auto", '"fp32", "bf16" or "fp16"'),
        ("steps_per_print", "auto", "a whole number from 1"),
        ("wall_clock_breakdown", "false", "true or false"),
        ("flops_profiler", True, "an object"),
        ("flops_profiler.profile_step", "auto", 'not "auto"'),
    ],
)
def test_a_value_that_would_mean_something_else_is_refused_with_what_is_right(key, value, right):
    section = value
    for part in reversed(key.split(".")):
        section = {part: section}
    with pytest.raises(ValueError, match=f"^{re.escape(key)} must be .*{re.escape(right)}.*, or left out, found "):
        check_offered(section)


@pytest.mark.parametrize("key", ["bf16.auto_cast", "data_types.grad_dtype", "fp16.loss_scale_windw"])
def test_a_key_that_deepspeed_does_not_know_there_is_refused(key):
    parent, name = key.split(".")
    with pytest.raises(ValueError, match=f"^{key} is not offered"):
        check_offered({parent: {name: 1}})


def test_published_values_are_taken_as_they_stand(tmp_path):
    tree = {"name": "a", "model": {"arch": "vit_ti_16"}, "train": {"global_batch": 8, "steps": 4}}
    said = """{"zero_optimization": {"stage": 3, "sub_group_size": 1e9, "reduce_bucket_size": 5e8, "overlap_comm": true,
        "stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": 5e7, "round_robin_gradients": false,
        "offload_optimizer": {"device": "cpu", "pin_memory": true}, "offload_param": null},
        "fp16": {"enabled": false, "loss_scale": 0, "hysteresis": 2, "min_loss_scale": 1}, "steps_per_print": 2e3,
        "bf16": {"enabled": "auto"}, "wall_clock_breakdown": false}"""
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({**tree, "optimizer": {"lr": 0.1}, "deepspeed": 0}).replace('"deepspeed": 0', f'"deepspeed": {said}')
    )
    zero = read_config(RunConfig, path).deepspeed["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["sub_group_size"]) == (500_000_000, 1_000_000_000)
    assert type(zero["reduce_bucket_size"]) is int


def test_the_same_keys_may_say_what_holds_anyway():
    check_offered({"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True})
    check_offered({"zero_optimization": {"stage": 2, "round_robin_gradients": False}})
    check_offered({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 0}})
