"""What may change when a run goes on, and what may not."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.engine.checkpoint import Saved
from pretrain.engine.offered import FIXED, LOGGING
from pretrain.errors import InputError
from pretrain.run.config import DataSection, RunConfig, TrainSection
from pretrain.run.configfile import differences

_DATA = ("chunk", "lanes", "crop", "crop_area", "crop_aspect", "flip", "decoder", "randaugment", "mixup")

# Said otherwise ("precision"), or of no effect on the function.
_LAYOUT = ("bf16", "zero_optimization", *FIXED, *LOGGING)

# An average may begin or end with any resume; how one that goes on is taken may not change.
_AVERAGING = "averaging"

# What `--extend` lets change: how long the run is, and the learning rate that follows from it.
_EXTENDABLE = ("train.steps", "schedule.")


def trained_function(config: RunConfig, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """The part of a config that the trained parameters are a function of.

    Ranks, micro-batch, workers, ZeRO stage, guards, logging, checkpoint cadence and evaluation are not in it; the data
    are, by the index's hash in the stream's state rather than by their path.
    """
    tree = config.model_dump(mode="json")
    return {
        "seed": tree["seed"],
        "model": tree["model"],
        "data": {key: tree["data"][key] for key in _DATA},
        "train": {
            "global_batch": config.train.global_batch,
            "steps": steps,
            "loss": config.train.loss,
            "label_smoothing": config.train.label_smoothing,
        },
        "optimizer": tree["optimizer"],
        "schedule": tree["schedule"],
        "precision": str(dtype).removeprefix("torch."),
        # Whatever else DeepSpeed is told may change what is computed (autocast, quantised communication).
        "deepspeed": _computing(tree["deepspeed"]),
    }


def refuse_changes(saved: Saved, now: dict[str, Any], *, extend: bool) -> None:
    """Refuse to resume `saved` under a config that trains another function.

    Raises:
        InputError: naming every key that differs, what it was and what it is.
    """
    before = _with_defaults(saved.state["function"])
    _refuse_late_average(before["optimizer"].get(_AVERAGING), now["optimizer"][_AVERAGING], saved.state["updates"])
    if before["optimizer"].get(_AVERAGING) is None or now["optimizer"][_AVERAGING] is None:
        before["optimizer"] = {**before["optimizer"], _AVERAGING: now["optimizer"][_AVERAGING]}
    changed = [
        (key, was, will) for key, was, will in differences(before, now) if not (extend and key.startswith(_EXTENDABLE))
    ]
    if changed:
        listed = "; ".join(f"{key} was {was!r}, is {will!r}" for key, was, will in changed)
        hint = (
            " (--extend allows another length and schedule)"
            if all(k.startswith(_EXTENDABLE) for k, *_ in changed)
            else ""
        )
        raise InputError(
            f"checkpoint {saved.path}: the run it belongs to was trained with another config: {listed}. "
            f"Restore these keys to resume{hint}, or give another --out to start anew"
        )


def _refuse_late_average(before: dict[str, Any] | None, now: dict[str, Any] | None, updates: int) -> None:
    """Refuse an average that begins with a resume but is said to begin earlier: debiasing counts from its beginning."""
    if before is None and now is not None and now["debias"] and now["start_step"] < updates:
        raise InputError(
            f"optimizer.averaging: begins with this resume, after {updates} updates; found start_step "
            f"{now['start_step']}, but the weights since then were not kept; optimizer.averaging.start_step={updates} "
            "would be right"
        )


def _computing(section: dict[str, Any]) -> dict[str, Any]:
    return {key: said for key, said in section.items() if key not in _LAYOUT}


def _with_defaults(function: dict[str, Any]) -> dict[str, Any]:
    """As it would be told now, of a run begun before.

    With the keys that have come since as they are left out: what they say was not there to be said. Without those of
    DeepSpeed's that have been found to be of no effect.
    """
    data = DataSection().model_dump(mode="json")
    smoothing = TrainSection.model_fields["label_smoothing"].default
    optimizer = function["optimizer"]
    if optimizer.get(_AVERAGING) is not None:  # averages were not debiased
        optimizer = {**optimizer, _AVERAGING: {"debias": False, **optimizer[_AVERAGING]}}
    return {
        **function,
        "optimizer": optimizer,
        "data": {**{key: data[key] for key in _DATA}, **function["data"]},
        "train": {"label_smoothing": smoothing, **function["train"]},
        "deepspeed": _computing(function["deepspeed"]),
    }
