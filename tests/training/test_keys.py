"""Every key of every config has a sentence, and what is generated from the fields is as generated."""

import json
import runpy
import subprocess
import sys
from typing import Any

import pytest

from fewshot.config import FewshotConfig
from finetune.config import FinetuneConfig
from finetune.evaluation.config import EvaluateConfig
from pretrain import keys
from pretrain.configfile import CONFIG_FOLDER, SCHEMA_FILE, _read_text, read_config
from pretrain.section import all_fields, mark
from pretrain.training.config import RunConfig

CONFIGS = sorted(path for path in CONFIG_FOLDER.rglob("*.json") if path.name != SCHEMA_FILE)


@pytest.mark.parametrize("schema", [RunConfig, FinetuneConfig, FewshotConfig, EvaluateConfig])
def test_every_key_has_a_sentence_and_a_rule(schema):
    for name, field in all_fields(schema):
        assert field.description, f"{name}: key(about=…) is missing"
        assert mark(field, "resume") in keys.RULES, name


def test_keys_are_told_with_values_default_and_sentence():
    told = {key.name: key for key in keys.keys(RunConfig)}
    found = [(told[name].type, told[name].default) for name in (
        "data.crop", "train.global_batch", "checkpoint.every", "optimizer.betas", "data.train", "optimizer.averaging",
        "deepspeed.zero_optimization.reduce_bucket_size", "deepspeed.zero_optimization.cpu_offload", "fewshot.every",
    )]  # fmt: skip
    assert found == [
        ('"torchvision" or "tensorflow"', '"torchvision"'),
        ("integer > 0", "required"),
        ("integer > 0 or null", "null"),
        ("[number ≥ 0, < 1, number ≥ 0, < 1]", "[0.9, 0.999]"),
        ("string or [string, …] or null", "null"),
        ("object or null", "null"),
        ("integer ≥ 1", "–"),
        ("not offered", "–"),
        ("integer > 0", "required"),
    ]
    assert 'train.loss: "sigmoid" or "softmax"; "softmax"\n    Binary' in keys.text(RunConfig)


def test_refused_options_stand_apart_from_the_keys():
    rows = list(keys.keys(RunConfig))
    assert "cpu_offload`" not in keys.markdown(rows)
    assert "`deepspeed.zero_optimization.cpu_offload`" in keys.refused_markdown(rows)
    offered, _, refused = keys.text(RunConfig).partition("are refused:\n")
    assert ("cpu_offload\n" in offered, "cpu_offload\n" in refused) == (False, True)
    assert keys.NOT_OFFERED not in offered + refused


def test_the_page_of_keys_and_the_schema_are_as_generated():
    for path, text in runpy.run_path("docs/generate.py")["contents"]().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run `python docs/generate.py`"


def test_the_example_is_a_config():
    config = read_config(RunConfig, "example.json")
    assert config.data.train is None
    assert json.loads(_read_text(CONFIG_FOLDER / "example.json"))["$schema"] == SCHEMA_FILE


# What editors make of configs/schema.json


def fits(value: Any, schema: dict[str, Any], tree: dict[str, Any]) -> bool:
    """Whether a value is of a JSON schema, as far as the words go that this one uses."""
    if "$ref" in schema:
        return fits(value, tree["$defs"][schema["$ref"].rpartition("/")[2]], tree)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    kind, number = schema.get("type"), isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "number" or kind == "integer":
        if not number or (kind == "integer" and not isinstance(value, int)):
            return False
    elif kind and not isinstance(value, kinds[kind]):
        return False
    return (
        ("anyOf" not in schema or any(fits(value, branch, tree) for branch in schema["anyOf"]))
        and value in schema.get("enum", [value])
        and value == schema.get("const", value)
        and (not number or value >= schema.get("minimum", value))
        and (not number or value > schema.get("exclusiveMinimum", value - 1))
        and (not number or value <= schema.get("maximum", value))
        and (not number or value < schema.get("exclusiveMaximum", value + 1))
        and (kind != "array" or all(
            fits(one, form, tree)
            for one, form in zip(value, schema.get("prefixItems") or [schema["items"]] * len(value), strict=True)
        ))
        and (kind != "object" or "properties" not in schema or all(
            key in schema["properties"] and fits(one, schema["properties"][key], tree) for key, one in value.items()
        ))
    )  # fmt: skip


@pytest.fixture(scope="module")
def schema():
    return json.loads((CONFIG_FOLDER / SCHEMA_FILE).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_shipped_configs_are_of_the_schema(path, schema):
    assert fits(json.loads(_read_text(path)), schema, schema)


@pytest.mark.parametrize(
    "wrong",
    [
        {"trian": {}},
        {"train": {"steps": 0}},
        {"data": {"crop": "mine"}},
        {"optimizer": {"betas": [1, 2]}},
        {"seed": "1"},
    ],
)
def test_what_a_config_is_refused_for_is_not(wrong, schema):
    assert not fits({"name": "a", **wrong}, schema, schema)


# The commands


@pytest.mark.parametrize(
    ("command", "option", "told"),
    [
        ("pretrain", "--help", "--keys"),
        ("pretrain", "--keys", "train.global_batch"),
        ("finetune", "--help", "--keys"),
        ("finetune", "--keys", "train.global_batch"),
        ("evaluate", "--help", "--keys"),
        ("evaluate", "--keys", "evaluate.bins"),
    ],
)
def test_help_and_keys_need_no_torch(command, option, told):
    """They answer at once, and on a machine where torch is not installed."""
    script = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["launch/{command}.py", "{option}"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert told in done.stdout
