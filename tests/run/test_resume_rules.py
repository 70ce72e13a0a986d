"""What a run may go on under, and with which settings of old."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.engine.checkpoint import Saved
from pretrain.errors import InputError
from pretrain.run.config import RunConfig
from pretrain.run.configfile import read_config
from pretrain.run.resume import refuse_changes, trained_function


def function(*overrides):
    config = read_config(RunConfig, "imagenet1k/b16.json", overrides)
    return trained_function(config, 100, torch.float32)


def saved(state):
    return Saved(Path("checkpoints/step_00000010"), 10, {"function": state, "ranks": 4, "zero_stage": 0, "updates": 10})


def test_a_run_begun_before_a_key_was_there_goes_on_with_the_key_left_out():
    old = function()
    for section, key in (
        ("data", "mixup"),
        ("data", "randaugment"),
        ("data", "decoder"),
        ("data", "crop"),
        ("train", "label_smoothing"),
    ):
        del old[section][key]
    refuse_changes(saved(old), function("data.crop=torchvision"), extend=False)
    with pytest.raises(InputError, match=r"data\.crop was 'torchvision', is 'tensorflow'"):
        refuse_changes(saved(old), function(), extend=False)
    with pytest.raises(InputError, match=r"data\.mixup was 0\.0, is 0\.2"):
        refuse_changes(saved(old), function("data.mixup=0.2"), extend=False)


@pytest.mark.parametrize(
    "override", ["data.randaugment=[2,10]", "data.mixup=0.1", "train.label_smoothing=0.1", "data.decoder=device"]
)
def test_what_changes_the_batches_is_refused(override):
    with pytest.raises(InputError, match=override.partition("=")[0]):
        refuse_changes(saved(function()), function(override), extend=False)


@pytest.mark.parametrize(
    "override",
    ["data.read_ahead_mib=7", "data.unreadable_chunks=quarantine", "data.max_unreadable=0.5", "data.workers=3"],
)
def test_what_does_not_is_not(override):
    refuse_changes(saved(function()), function(override), extend=False)


LOGGING = [
    "deepspeed.steps_per_print=10", "deepspeed.wall_clock_breakdown=true", "deepspeed.memory_breakdown=true",
    "deepspeed.dump_state=true", 'deepspeed.flops_profiler={"enabled":true}', 'deepspeed.comms_logger={"enabled":true}',
    'deepspeed.tensorboard={"enabled":true}', 'deepspeed.wandb={"enabled":true}',
    'deepspeed.csv_monitor={"enabled":true}', 'deepspeed.comet={"enabled":true}',
]  # fmt: skip


@pytest.mark.parametrize("override", [*LOGGING, "deepspeed.zero_allow_untested_optimizer=true"])
def test_what_deepspeed_is_to_report_may_come_and_go(override):
    refuse_changes(saved(function()), function(override), extend=False)
    refuse_changes(saved(function(override)), function(), extend=False)


def test_a_run_that_took_it_for_a_part_of_what_is_trained_goes_on_without_it():
    old = function()
    old["deepspeed"] = {**old["deepspeed"], "steps_per_print": 10, "zero_force_ds_cpu_optimizer": True}
    refuse_changes(saved(old), function(), extend=False)


def test_what_deepspeed_is_to_compute_otherwise_is_refused():
    with pytest.raises(InputError, match=r"deepspeed\.communication_data_type was None, is 'fp32'"):
        refuse_changes(saved(function()), function("deepspeed.communication_data_type=fp32"), extend=False)


def averaging(**changes):
    return "optimizer.averaging=" + json.dumps({"decay": 0.9999, **changes})


def test_a_run_whose_average_was_not_debiased_goes_on_only_so():
    old = function(averaging())
    del old["optimizer"]["averaging"]["debias"]
    refuse_changes(saved(old), function(averaging(debias=False)), extend=False)
    with pytest.raises(InputError, match=r"optimizer\.averaging\.debias was False, is True"):
        refuse_changes(saved(old), function(averaging()), extend=False)


def test_an_average_that_begins_with_a_resume_says_so():
    refuse_changes(saved(function()), function(averaging(start_step=10)), extend=False)
    refuse_changes(saved(function()), function(averaging(debias=False)), extend=False)
    with pytest.raises(InputError, match=r"after 10 updates.*start_step=10"):
        refuse_changes(saved(function()), function(averaging()), extend=False)
