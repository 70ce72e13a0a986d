"""What may change when a run goes on, and what may not: every key of a config that is not named here."""

from __future__ import annotations

import json
from typing import Any

import torch
from pydantic import BaseModel

from pretrain.checkpoint.step import Checkpoint
from pretrain.engine.offered import FIXED, LOGGING
from pretrain.errors import InputError
from pretrain.run.config import RunConfig
from pretrain.run.configfile import differences

# Keys, or sections of them, that the trained function does not depend on.
FREE = (
    "name", "fewshot", "checkpoint", "logging",
    "data.train",  # the stream's state has the hash of its index
    "data.eval", "data.eval_crop", "data.mismatch", "data.workers", "data.audit", "data.read_ahead_mib",
    "data.patience_minutes",
    "data.unreadable_chunks", "data.max_unreadable",  # they say when a run ends
    "train.micro_batch", "train.activation_checkpointing", "train.compile", "train.eval_every",
    "train.time_limit_minutes", "train.hang_minutes", "train.slow_minutes",
    "deepspeed.bf16",  # its choice is `precision`
    "deepspeed.zero_optimization", *(f"deepspeed.{key}" for key in (*FIXED, *LOGGING)),
)  # fmt: skip

# Of these, what scores are of: a series of them does not go on unremarked with other ones.
MEASURED = ("data.eval", "data.eval_crop", "fewshot")

# What may change, but has a say in what is trained: a config that leaves it out must not end it unnoticed. An average
# may begin or end with any resume; how one that goes on is taken may not change.
BY_WORD, AVERAGING = ("train.guard",), "optimizer.averaging"

# What `--extend` lets change, by word too: how long the run is, and the learning rate that follows from it.
EXTENDABLE = ("train.steps", "schedule")


def resolved(config: RunConfig, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """A config as checkpoints keep it: its length in steps, its precision said."""
    tree = config.model_dump(mode="json")
    length = {"steps": steps, "epochs": None}
    return {**tree, "train": {**tree["train"], **length}, "precision": str(dtype).removeprefix("torch.")}


def check_changes(saved: Checkpoint, config: RunConfig, now: dict[str, Any], *, extend: bool) -> list[str]:
    """Refuse to resume `saved` under a config that trains another function.

    Args:
        now: `config`, resolved.
        extend: allow another length and schedule.

    Returns:
        notes on what the trained function does not depend on: what is left out, so that it ends, and what is measured
        otherwise.

    Raises:
        InputError: naming every key that differs or is left out, what it was and what would be right.
    """
    before = _completed(saved.state.get("config") or saved.state["function"], _usual(), now)
    others, ended, dropped, measured = [], [], [], []
    for key, was, will in differences(before, now):
        said = key == "train.steps" or _said(config, key)
        text = f"{key} was {json.dumps(was)}"
        if _within(key, FREE):
            dropped += [] if said else [text]
            if said and was is not None and _within(key, MEASURED):
                measured.append(f"{text}, is {json.dumps(will)}")
        elif not (_within(key, BY_WORD) or key == AVERAGING or (extend and _within(key, EXTENDABLE))):
            others.append((key, f"{text}, is {json.dumps(will)}"))
        elif not said:
            keep, end = (f"{key}={json.dumps(value, separators=(',', ':'))}" for value in (was, will))
            ended.append(f"{text} and is left out: {keep} keeps it, {end} ends it")
    average = before["optimizer"][AVERAGING.rpartition(".")[2]]
    if average is None and not others:
        _refuse_late_average(config, saved.state["updates"])
    if not others and not ended:
        return [
            *([f"note: left out, and so as by default again: {'; '.join(dropped)}"] if dropped else []),
            *([f"note: from here on scores are of something else: {'; '.join(measured)}"] if measured else []),
        ]
    mend = "Say these keys to resume"
    if others:
        mend = "Restore these keys to resume"
        if all(_within(key, EXTENDABLE) for key, _ in others):
            mend += " (--extend allows another length and schedule)"
    raise InputError(
        f"checkpoint {saved.path}: the run it belongs to was trained with another config: "
        f"{'; '.join([text for _, text in others] + ended)}. {mend}, or give another --out to start anew"
    )


def _refuse_late_average(config: RunConfig, updates: int) -> None:
    """Refuse an average that begins with a resume but is said to begin earlier: debiasing counts from its beginning."""
    now = config.optimizer.averaging
    if now is not None and now.debias and now.start_step < updates:
        raise InputError(
            f"{AVERAGING}: begins with this resume, after {updates} updates; found start_step {now.start_step}, but "
            f"the weights since then were not kept; {AVERAGING}.start_step={updates} would be right"
        )


def _within(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _said(config: BaseModel, key: str) -> bool:
    """Whether the config's file or the command line says it, if only as null, in itself or with what it is part of."""
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


def _usual() -> dict[str, Any]:
    """The defaults of all keys. What a new key says when it is left out is what was done before there was the key."""
    config = RunConfig.model_validate(
        {
            "name": "usual",
            "model": {"arch": "vit_ti_16"},
            "train": {"global_batch": 1, "steps": 1},
            "optimizer": {"lr": 1.0, "averaging": {"debias": False}},  # averages were not debiased
        }
    )
    return config.model_dump(mode="json")


def _completed(before: dict[str, Any], usual: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a checkpoint says, with the keys that have come since or that it did not keep."""
    full = dict(before)
    for name, value in usual.items():
        key = prefix + name
        if name not in before:
            full[name] = now.get(name) if key == AVERAGING or _within(key, (*FREE, *BY_WORD)) else value
        elif isinstance(value, dict) and isinstance(before[name], dict):
            full[name] = _completed(before[name], value, now.get(name) or {}, f"{key}.")
    return full
