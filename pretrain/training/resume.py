"""What a resume may change: the rule of each config key stands with its field (`pretrain.section.key`)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain.checkpoint.step import Checkpoint
from pretrain.configfile import differences
from pretrain.engine.section import AsGiven
from pretrain.errors import InputError
from pretrain.section import Resume, Section, all_fields, mark, section_of, without_gone
from pretrain.training.config import RunConfig

_AVERAGING = "optimizer.averaging"


def resolved(config: RunConfig, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """A config as checkpoints hold it: with its length in steps and its precision."""
    tree = config.model_dump(mode="json")
    length = {"steps": steps, "epochs": None}
    return {**tree, "train": {**tree["train"], **length}, "precision": str(dtype).removeprefix("torch.")}


def check_changes(saved: Checkpoint, config: RunConfig, now: dict[str, Any], *, extend: bool) -> list[str]:
    """Refuse to resume `saved` under a config that trains another function.

    Args:
        now: `config`, resolved.
        extend: allow another length and schedule.

    Returns:
        notes on keys that the weights do not depend on: those left out, and those that change what is scored.

    Raises:
        InputError: it names every key that differs or is left out, what it was and what would be right.
    """
    before = completed(saved.state.get("config") or saved.state["function"], RunConfig, now)
    others, ended, dropped, measured = [], [], [], []
    for key, was, will in differences(before, now):
        rule, stated = rule_of(key, RunConfig), key == "train.steps" or _stated(config, key)
        text = f"{key} was {json.dumps(was)}"
        if rule in ("free", "measured"):
            if not stated:
                dropped.append(text)
            elif rule == "measured" and was is not None:
                measured.append(f"{text}, is {json.dumps(will)}")
        elif rule == "fixed" or (rule == "extendable" and not extend):
            others.append((rule, f"{text}, is {json.dumps(will)}"))
        elif not stated:
            keep, end = (f"{key}={json.dumps(value, separators=(',', ':'))}" for value in (was, will))
            ended.append(f"{text} and is left out: {keep} keeps it, {end} ends it")
    if before["optimizer"]["averaging"] is None and not others:
        _refuse_late_average(config, saved.state["updates"])
    if not others and not ended:
        best = config.checkpoint.best
        mixed = f"; checkpoint.best: {best} of before is compared with that of from here on" if best else ""
        return [
            *([f"note: left out, and so as by default again: {'; '.join(dropped)}"] if dropped else []),
            *([f"note: from here on scores are of something else: {'; '.join(measured)}{mixed}"] if measured else []),
        ]
    mend = "Say these keys to resume"
    if others:
        mend = "Restore these keys to resume"
        if all(rule == "extendable" for rule, _ in others):
            mend += " (--extend allows another length and schedule)"
    raise InputError(
        f"checkpoint {saved.path}: the run it belongs to was trained with another config: "
        f"{'; '.join([text for _, text in others] + ended)}. {mend}, or give another --out to start anew"
    )


def rule_of(key: str, schema: type[Section]) -> Resume:
    """What a resume may do with a dotted key. Below a field that is no section, the field's rule holds."""
    fields = _fields(schema)
    while key not in fields:
        key, dot, _ = key.rpartition(".")
        if not dot or (key in fields and section_of(fields[key])):
            return "fixed"  # this version has no such key
    rule: Resume = mark(fields[key], "resume")
    return rule


@cache
def _fields(schema: type[Section]) -> dict[str, FieldInfo]:
    return dict(all_fields(schema))


def _refuse_late_average(config: RunConfig, updates: int) -> None:
    """Refuse an average that begins now but has an earlier `start_step`, from which debiasing would count."""
    now = config.optimizer.averaging
    if now is not None and now.debias and now.start_step < updates:
        raise InputError(
            f"{_AVERAGING}: begins with this resume, after {updates} updates; found start_step {now.start_step}, but "
            f"the weights since then were not kept; {_AVERAGING}.start_step={updates} would be right"
        )


def _stated(config: BaseModel, key: str) -> bool:
    """Whether the file or the command line sets the key or a value around it, be it to null."""
    at: Any = config
    for name in key.split("."):
        if isinstance(at, BaseModel):
            if name not in at.model_fields_set:
                return False
            at = getattr(at, name)
        elif isinstance(at, dict):
            if name not in at:
                return False
            at = at[name]
    return True


def completed(before: dict[str, Any], schema: type[Section], now: dict[str, Any]) -> dict[str, Any]:
    """A recorded config without the keys that are gone, and with those that it lacks: newer ones, and unrecorded ones.

    A missing key that determines the weights gets the value that it had before it existed; any other, today's.
    """
    return _completed(without_gone(schema, before), schema, now)


def _completed(before: dict[str, Any], schema: type[Section], now: dict[str, Any]) -> dict[str, Any]:
    full = dict(before)
    for name, field in schema.model_fields.items():
        section, old, new = section_of(field), before.get(name), now.get(name)
        if section and issubclass(section, AsGiven):
            full.setdefault(name, {})
        elif section and isinstance(old if name in before else field.default, dict | Section):
            full[name] = _completed(old or {}, section, new or {})
        elif name not in before:
            default = mark(field, "before")
            fixed = mark(field, "resume") in ("fixed", "extendable")
            full[name] = (list(default) if isinstance(default, tuple) else default) if fixed else new
    return full
