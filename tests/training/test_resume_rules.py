"""What a run may go on under, and with which settings of old."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.step import Checkpoint
from pretrain.configfile import read_config
from pretrain.errors import InputError
from pretrain.section import all_fields, mark, section_of
from pretrain.training.config import RunConfig
from pretrain.training.resume import check_changes, resolved

BASE = {
    "name": "base",
    "model": {"arch": "vit_ti_16"},
    "train": {"global_batch": 64, "steps": 100},
    "optimizer": {"lr": 0.1},
}
# Another value of every key. Those that a resume may change: freely, or by word only; nothing else.
FREE = {
    "name": "other", "data.train": "elsewhere", "data.eval": "there", "data.eval_crop": "whole",
    "data.mismatch": "refuse", "data.workers": 9, "data.audit": True,
    "data.read_ahead_mib": 7, "data.patience_minutes": 7.0, "data.unreadable_chunks": "quarantine",
    "data.max_unreadable": 0.5, "train.micro_batch": 8,
    "train.activation_checkpointing": "full", "train.compile": True, "train.deterministic": True, "train.eval_every": 5,
    "train.time_limit_minutes": 5.0, "train.hang_minutes": 20.0, "train.slow_minutes": 20.0,
    "fewshot": {"every": 5, "support": "a", "query": "b"}, "checkpoint.every": 5, "checkpoint.every_minutes": 5.0,
    "checkpoint.keep": 5, "checkpoint.keep_every": 5, "checkpoint.best": "eval/top1",
    "checkpoint.background": False, "logging.every": 5,
    "logging.tensorboard": False, "logging.peak_tflops": 5.0, "deepspeed": {"zero_optimization": {"stage": 2}},
}  # fmt: skip
BY_WORD = {
    "train.guard.skips": 5, "train.guard.then": "rollback", "train.guard.spike": 5.0, "train.guard.margin": 5,
    "train.guard.rollbacks": 5, "optimizer.averaging": {"decay": 0.5, "start_step": 10},
}  # fmt: skip
EXTENDABLE = {
    "train.steps": 200, "schedule.warmup_steps": 5, "schedule.decay": "cosine", "schedule.final_lr": 0.01,
}  # fmt: skip
FIXED = {
    "seed": 1, "model.arch": "vit_s_16", "model.patch_size": 32, "model.layers": 5, "model.width": 96, "model.mlp": 96,
    "model.heads": 6, "model.image_size": 64, "model.channels": 1, "model.num_classes": 5,
    "model.representation_size": 5, "model.dropout": 0.1, "model.drop_path": 0.1,
    "model.gelu": "tanh", "model.pool": "mean",
    "model.positions": "sincos2d", "model.norm_eps": 1e-5, "model.qkv_bias": False,
    "model.head_bias": -1.0, "data.chunk": 16, "data.lanes": 64, "data.crop": "tensorflow",
    "data.held_out": 0.1,
    "data.crop_area": [0.5, 1.0], "data.crop_aspect": [1.0, 1.0], "data.flip": False,
    "data.randaugment": [2, 10], "data.mixup": 0.2, "data.cutmix": 1.0, "train.global_batch": 128,
    "train.loss": "sigmoid", "train.label_smoothing": 0.1, "train.freeze": 2, "optimizer.layer_decay": 0.5,
    "optimizer.momentum_dtype": "bfloat16", "optimizer.name": "sgd", "optimizer.lr": 0.2,
    "optimizer.betas": [0.8, 0.9],
    "optimizer.eps": 0.1, "optimizer.momentum": 0.5, "optimizer.weight_decay": 0.1, "optimizer.decay": "all",
    "optimizer.clip_norm": 0.0,
}  # fmt: skip
NEEDS = {"optimizer.momentum_dtype": [("optimizer.name", "sgd")]}  # without which a key has no meaning
LENGTH = {"train.epochs": 2.0}  # told in steps


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "base.json"
    path.write_text(json.dumps(BASE))
    return path


@pytest.fixture(scope="module")
def config(file):
    """config(key=value, …), or ((key, value), …): the base with these keys said."""
    return lambda *said: read_config(RunConfig, file, [f"{key}={json.dumps(value)}" for key, value in said])


def kept(config):
    """A config as a checkpoint keeps it."""
    return resolved(config, config.train.steps or 100, torch.float32)


def resume(before, now, *, extend=False, key="config"):
    tree = before if isinstance(before, dict) else kept(before)
    saved = Checkpoint(Path("checkpoints/step_00000010"), 10, {key: tree, "updates": 10})
    return check_changes(saved, now, kept(now), extend=extend)


def test_every_key_is_part_of_what_is_trained_unless_its_field_says_otherwise():
    """All fields of all sections; a new one belongs to a table here, or is fixed."""
    begun_or_ended = ("fewshot", "optimizer.averaging")  # sections that may be null
    fields = {key: field for key, field in all_fields(RunConfig) if key in begun_or_ended or not section_of(field)}
    tables = {key for table in (FREE, BY_WORD, EXTENDABLE, FIXED, LENGTH) for key in table} - {"deepspeed"}
    assert tables == {key for key in fields if not key.startswith(("deepspeed.", "fewshot.", "optimizer.averaging."))}
    told = {"stated": BY_WORD, "extendable": (*EXTENDABLE, *LENGTH)}
    for key, field in fields.items():
        computed = re.match(r"deepspeed\.(fp16\.|data_types\.|communication_data_type)", key)
        free = key in FREE or key.startswith("fewshot.") or (key.startswith("deepspeed.") and not computed)
        rule = next((name for name, keys in told.items() if key in keys), "free" if free else "fixed")
        assert mark(field, "resume").replace("measured", "free") == rule, key


@pytest.mark.parametrize("key", FIXED)
def test_what_is_trained_may_not_change_even_with_extend(config, key):
    usual = config(*NEEDS.get(key, []))
    said = config(*NEEDS.get(key, []), (key, FIXED[key]))
    for before, now in ((usual, said), (said, usual)):
        with pytest.raises(InputError, match=rf"{re.escape(key)} was .*, is .*\. Restore these keys to resume, or"):
            resume(before, now, extend=True)


@pytest.mark.parametrize("key", EXTENDABLE)
def test_length_and_schedule_change_with_extend_and_by_word(config, key):
    said = config((key, EXTENDABLE[key]))
    with pytest.raises(InputError, match=rf"{key} was .*\(--extend allows another length and schedule\)"):
        resume(config(), said)
    assert resume(config(), said, extend=True) == []
    if key != "train.steps":  # without which, or epochs, there is no config
        with pytest.raises(InputError, match=rf"{key} was .* and is left out: {key}=.* keeps it, {key}=.* ends it"):
            resume(said, config(), extend=True)


@pytest.mark.parametrize("key", BY_WORD)
def test_what_has_a_say_in_it_may_change_but_not_by_being_left_out(config, key):
    said, usual = config((key, BY_WORD[key])), config().model_dump(mode="json")
    assert resume(config(), said) == []
    with pytest.raises(InputError, match=rf"{key} was (.*) and is left out: {key}=.* keeps it, {key}=.* ends it"):
        resume(said, config())
    for part in key.split("."):
        usual = usual[part]
    assert resume(said, config((key, usual))) == []
    if key.startswith("train.guard"):
        with pytest.raises(InputError, match=key):
            resume(said, config(("train.guard", {})))


def test_an_average_that_goes_on_is_taken_as_it_was(config):
    began = config(("optimizer.averaging", {"decay": 0.5}))
    assert resume(began, began) == []
    assert resume(began, config(("optimizer.averaging", None))) == [], "ended by word"
    for key, value in (("decay", 0.6), ("start_step", 5), ("debias", False)):
        with pytest.raises(InputError, match=rf"optimizer\.averaging\.{key} was"):
            resume(began, config(("optimizer.averaging", {"decay": 0.5, key: value})))


def test_a_best_checkpoint_of_other_scores_is_noted(config):
    best = ("checkpoint.best", "eval/top1")
    (note,) = resume(config(best), config(best, ("data.eval_crop", "whole")))
    assert note.endswith('is "whole"; checkpoint.best: eval/top1 of before is compared with that of from here on')


@pytest.mark.parametrize("key", FREE)
def test_what_is_of_no_effect_may_come_and_go_and_what_goes_is_noted(config, key):
    said = config((key, FREE[key]))
    began = (
        []
        if key != "data.eval_crop"
        else ['note: from here on scores are of something else: data.eval_crop was "centre", is "whole"']
    )
    assert resume(config(), said) == began
    notes = resume(said, config())
    if key in BASE:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"note: left out, and so as by default again: {key}")


def test_a_length_in_epochs_is_the_same_as_in_steps(config):
    assert resume(config(), config(*LENGTH.items())) == []


LOGGING = [
    ("steps_per_print", 10), ("wall_clock_breakdown", True), ("memory_breakdown", True), ("dump_state", True),
    ("zero_allow_untested_optimizer", True),
    *((name, {"enabled": True}) for name in
      ("flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [*LOGGING, ("zero_optimization", {"stage": 3, "sub_group_size": 5}), ("bf16", {"immediate_grad_update": True})],
)
def test_what_deepspeed_is_to_report_may_come_and_go(config, key, value):
    said = config((f"deepspeed.{key}", value))
    assert resume(config(), said) == []
    assert f"deepspeed.{key} was" in resume(said, config())[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("communication_data_type", "fp32"), ("data_types", {}), ("fp16", {}), ("fp16", {"loss_scale": 8})],
)
def test_what_deepspeed_is_to_compute_otherwise_is_refused(config, key, value):
    said = config((f"deepspeed.{key}", value))
    for before, now in ((config(), said), (said, config())):
        with pytest.raises(InputError, match=rf"deepspeed\.{key} was"):
            resume(before, now)


def test_another_precision_is_refused(config):
    before = {**kept(config()), "precision": "bfloat16"}
    with pytest.raises(InputError, match='precision was "bfloat16", is "float32"'):
        resume(before, config())


# Of runs begun by an earlier version.


def old(config):
    """As it was kept then: what the trained parameters are a function of, and no more."""
    tree = copy.deepcopy(kept(config))
    for key in (*FREE, *LENGTH, *BY_WORD, "train.guard", "checkpoint", "logging"):
        if key not in ("optimizer.averaging", "deepspeed"):
            *parents, last = key.split(".")
            section = tree
            for parent in parents:
                section = section.get(parent, {})
            section.pop(last, None)
    return tree


def test_a_run_of_before_goes_on_and_is_refused_by_the_same_rules(config):
    before = old(config(("optimizer.averaging", {"decay": 0.5, "debias": False})))
    now = config(("optimizer.averaging", {"decay": 0.5, "debias": False}), ("data.workers", 9))
    assert resume(before, now, key="function") == []
    with pytest.raises(InputError, match=r"optimizer\.averaging was .* and is left out"):
        resume(before, config(), key="function")
    with pytest.raises(InputError, match=r"data\.flip was true, is false"):
        resume(old(config()), config(("data.flip", False)), key="function")


def test_a_run_begun_before_a_key_was_there_goes_on_with_the_key_left_out(config):
    before = old(config())
    for key in ("mixup", "randaugment", "crop"):
        del before["data"][key]
    del before["train"]["label_smoothing"]
    assert resume(before, config(), key="function") == []
    with pytest.raises(InputError, match=r'data\.crop was "torchvision", is "tensorflow"'):
        resume(before, config(("data.crop", "tensorflow")), key="function")
    with pytest.raises(InputError, match=r"data\.mixup was 0\.0, is 0\.2"):
        resume(before, config(("data.mixup", 0.2)), key="function")


def test_a_run_begun_with_a_key_that_is_no_more_resumes_where_its_value_is_what_all_runs_have(config):
    before = old(config())
    before["data"]["decoder"] = "host"
    assert resume(before, config(), key="function") == []
    before["data"]["decoder"] = "device"
    with pytest.raises(InputError, match=r'data\.decoder was "device", is null'):
        resume(before, config(), key="function")


def test_a_run_that_took_it_for_a_part_of_what_is_trained_goes_on_without_it(config):
    before = old(config())
    before["deepspeed"] = {**before["deepspeed"], "steps_per_print": 10, "zero_force_ds_cpu_optimizer": True}
    assert "deepspeed.steps_per_print was 10" in resume(before, config(), key="function")[0]


def test_a_run_whose_average_was_not_debiased_goes_on_only_so(config):
    before = old(config(("optimizer.averaging", {"decay": 0.9})))
    del before["optimizer"]["averaging"]["debias"]
    assert resume(before, config(("optimizer.averaging", {"decay": 0.9, "debias": False})), key="function") == []
    with pytest.raises(InputError, match=r"optimizer\.averaging\.debias was false, is true"):
        resume(before, config(("optimizer.averaging", {"decay": 0.9})), key="function")


def test_an_average_that_begins_with_a_resume_says_so(config):
    assert resume(config(), config(("optimizer.averaging", {"start_step": 10}))) == []
    assert resume(config(), config(("optimizer.averaging", {"debias": False}))) == []
    with pytest.raises(InputError, match=r"after 10 updates.*start_step=10"):
        resume(config(), config(("optimizer.averaging", {"decay": 0.9})))
