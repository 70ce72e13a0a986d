"""What DeepSpeed would ignore, take otherwise or cannot do here is refused; what is accepted reaches it as given."""

import json

import pytest
from pydantic import ValidationError

from finetune.config import FinetuneConfig
from pretrain.configfile import CONFIG_FOLDER, read_config
from pretrain.engine.section import DeepSpeedSection
from pretrain.errors import InputError
from pretrain.training.config import RunConfig

SMALL = {
    "name": "a", "model": {"arch": "vit_ti_16"}, "train": {"global_batch": 8, "steps": 4}, "optimizer": {"lr": 0.1},
}  # fmt: skip
CPU = {"device": "cpu"}


@pytest.fixture
def refusal(tmp_path):
    """What a config with this `deepspeed` section is refused with."""

    def told(section: dict) -> str:
        path = tmp_path / "c.json"
        path.write_text(json.dumps({**SMALL, "deepspeed": section}))
        with pytest.raises(InputError) as error:
            read_config(RunConfig, path)
        return str(error.value).removeprefix(f"config {path}: deepspeed.")

    return told


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            ("zero_optimization.round_robin_gradients: found true; not offered: ", "would mix them up; leave it out"),
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1000}},
            ("zero_optimization.stage3_module_granularity_threshold: found 1000; not offered: ", "leave it out"),
        ),
        (
            {"zero_force_ds_cpu_optimizer": True, "zero_optimization": {"stage": 1, "offload_optimizer": CPU}},
            ("zero_force_ds_cpu_optimizer: found true; false would be right, or leave it out",),
        ),
        (
            {"zero_allow_untested_optimizer": False, "zero_optimization": {"stage": 1}},
            ("zero_allow_untested_optimizer: found false; true would be right, or leave it out",),
        ),
        ({"zero_optimization": {"stage": 1, "zenflow": {}}}, ("zero_optimization.zenflow: found {}; not offered",)),
    ],
)
def test_what_would_fail_or_do_harm_later_is_refused(section, words, refusal):
    told = refusal(section)
    assert told.startswith(words[0])
    assert told.endswith(words[-1]) or len(words) == 1


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("zero_optimization.reduce_bucket_size", "auto", "valid integer"),
        ("zero_optimization.reduce_bucket_size", "5e8", "valid integer"),
        ("zero_optimization.reduce_bucket_size", 0, "greater than or equal to 1"),
        ("zero_optimization.reduce_bucket_size", True, "valid integer"),
        ("zero_optimization.reduce_bucket_size", 1.5, "valid integer"),
        ("zero_optimization.reduce_bucket_size", None, "valid integer"),
        ("zero_optimization.reduce_bucket_size", 2**63, "less than 9223372036854775808"),
        ("zero_optimization.allgather_bucket_size", 5, "a multiple of 2"),
        ("zero_optimization.sub_group_size", -1, "greater than or equal to 1"),
        ("zero_optimization.stage3_prefetch_bucket_size", "auto", "valid integer"),
        ("zero_optimization.stage3_param_persistence_threshold", "auto", "valid integer"),
        ("zero_optimization.stage3_max_live_parameters", -1, "greater than or equal to 0"),
        ("zero_optimization.overlap_comm", "auto", "true or false or null"),
        ("zero_optimization.contiguous_gradients", "true", "true or false"),
        ("zero_optimization.contiguous_gradients", None, "true or false"),
        ("zero_optimization.stage", "2", "valid integer"),
        ("zero_optimization.stage", True, "valid integer"),
        ("zero_optimization.offload_optimizer.device", "auto", '"cpu" or "none"'),
        ("zero_optimization.offload_optimizer.pin_memory", 1, "true or false"),
        ("fp16.enabled", "auto", "true or false"),
        ("fp16.loss_scale", "auto", "valid integer"),
        ("fp16.min_loss_scale", 0, "greater than or equal to 1"),
        ("fp16.initial_scale_power", "16", "valid integer"),
        ("bf16.enabled", 1, "true or false"),
        ("bf16.enabled", 1, '"auto"'),
        ("zero_allow_untested_optimizer", 1, "true or false"),
        ("bf16.immediate_grad_update", "no", "true or false"),
        ("data_types.grad_accum_dtype", "auto", '"fp32", "float32" or "float"'),
        ("communication_data_type", "auto", '"fp32", "bf16" or "fp16"'),
        ("steps_per_print", "auto", "valid integer"),
        ("wall_clock_breakdown", "false", "true or false"),
        ("flops_profiler", True, "an object"),
    ],
)
def test_a_value_that_would_mean_something_else_is_refused_with_what_is_right(key, value, right, refusal):
    section = value
    for part in reversed(key.split(".")):
        section = {part: section}
    told = refusal(section)
    assert told.startswith(f"{key}: found {json.dumps(value)}; input should be")
    assert right in told


def test_auto_is_refused_in_what_deepspeed_reports_too(refusal):
    for section in ({"profile_step": "auto"}, {"nested": {"profile_step": "auto"}}):
        assert refusal({"flops_profiler": section}).startswith('flops_profiler: profile_step is "auto"; the value')


@pytest.mark.parametrize("key", ["bf16.auto_cast", "data_types.grad_dtype", "fp16.loss_scale_windw"])
def test_a_key_that_deepspeed_does_not_know_there_is_refused(key, refusal):
    parent, name = key.split(".")
    assert refusal({parent: {name: 1}}).startswith(f"{key}: unknown key; ")


def test_published_values_are_taken_as_they_stand(tmp_path):
    said = """{"zero_optimization": {"stage": 3, "sub_group_size": 1e9, "reduce_bucket_size": 5e8, "overlap_comm": true,
        "stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": 5e7, "round_robin_gradients": false,
        "offload_optimizer": {"device": "cpu", "pin_memory": true}, "offload_param": null},
        "fp16": {"enabled": false, "loss_scale": 0, "hysteresis": 2, "min_loss_scale": 1}, "steps_per_print": 2e3,
        "bf16": {"enabled": "auto"}, "wall_clock_breakdown": false}"""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**SMALL, "deepspeed": 0}).replace('"deepspeed": 0', f'"deepspeed": {said}'))
    handed = read_config(RunConfig, path).deepspeed.model_dump()
    assert handed == json.loads(said), "an exponent is a whole number"
    assert type(handed["zero_optimization"]["reduce_bucket_size"]) is int


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True},
        {"zero_optimization": {"stage": 2, "round_robin_gradients": False, "overlap_comm": None, "zenflow": None}},
        {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 0, "offload_param": None}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {**CPU, "pin_memory": True}, "offload_param": CPU}},
        {"zero_optimization": {}, "data_types": {}, "bf16": {}, "fp16": {"enabled": False, "loss_scale": 0}},
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto", "check_grad_overflow": True}},
        {"bf16": {"enabled": False, "bf16_optimizer_states": True}, "communication_data_type": "fp32"},
        {"flops_profiler": {"enabled": True, "output_file": None}, "wandb": {}, "steps_per_print": 10},
    ],
)
def test_only_what_is_given_is_handed_on_and_as_it_stands(section):
    read = DeepSpeedSection.model_validate_json(json.dumps(section))
    assert read.model_dump() == read.model_dump(mode="json") == section


@pytest.mark.parametrize("name", ["b16.json", "finetune/imagenet384.json", "quickstart/pretrain.json"])
def test_so_it_is_of_the_recipes_that_the_others_extend(name):
    config = read_config(FinetuneConfig if "finetune" in name else RunConfig, name)
    assert config.deepspeed.model_dump() == json.loads((CONFIG_FOLDER / name).read_text())["deepspeed"]


def test_values_from_python_are_checked_too():
    with pytest.raises(ValidationError):
        DeepSpeedSection(zero_optimization={"stage": 5})
