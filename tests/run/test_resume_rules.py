"""What a run may go on under, and with which settings of old."""

from pathlib import Path

import pytest
import torch

from pretrain.engine.checkpoint import Saved
from pretrain.errors import InputError
from pretrain.run.config import RunConfig, read_config
from pretrain.run.resume import refuse_changes, trained_function


def function(*overrides):
    config = read_config(RunConfig, "imagenet1k/b16.json", overrides)
    return trained_function(config, 100, torch.float32)


def saved(state):
    return Saved(Path("checkpoints/step_00000010"), 10, {"function": state, "ranks": 4, "zero_stage": 0})


def test_a_run_begun_before_a_key_was_there_goes_on_with_the_key_left_out():
    old = function()
    for section, key in (("data", "mixup"), ("data", "randaugment"), ("data", "decoder"), ("train", "label_smoothing")):
        del old[section][key]
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
