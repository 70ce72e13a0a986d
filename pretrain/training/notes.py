"""What a run's beginning says besides its sizes: where network and data do not fit, and what of a config is idle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.errors import InputError
from pretrain.index.compare import shared_shards, unnamed_text
from pretrain.index.index import Index
from pretrain.section import Section
from pretrain.stream.colour import colour_text
from pretrain.training.config import RunConfig


def check_fit(config: RunConfig, train: Index, evaluated: Index | None) -> list[str]:
    """Where the network does not fit `data.train` and `data.eval`, a sentence each. Looks at some of their images.

    Raises:
        InputError: it does not, and `data.mismatch` says to refuse that; or no image has a label.
    """
    if not train.num_classes:
        raise InputError("data.train: no image has a label, so there is nothing to learn; index the shards with labels")
    model = config.model
    found: list[str] = []
    idle: list[str] = []
    classes = max(train.num_classes, len(train.classes or ()))
    if model.num_classes > classes:
        found.append(
            f"model.num_classes: the network has {model.num_classes:,} outputs, data.train has {classes:,} "
            f"class{'es' * (classes > 1)}: {_range(classes, model.num_classes - 1)} will never see an image; "
            f"model.num_classes={classes} would be right for these data"
        )
    for key, index in (("data.train", train), ("data.eval", evaluated)):
        text = colour_text(model.channels, index, key, config.data.timeouts()) if index else ""
        if text:  # colour that is dropped is lost, grey that is repeated is not
            (found if model.channels == 1 else idle).append(text)
    if found and config.data.mismatch == "refuse":
        raise InputError("\n".join(f"{one}, or data.mismatch=note to train all the same" for one in found))
    return found + idle


def run_notes(config: RunConfig, steps: int, train: Index, evaluated: Index | None, samples: int) -> list[str]:
    """What a user may not have meant, a sentence each: in the data, and keys of no effect in `steps` steps.

    `samples`: those of `train` that are trained on.
    """
    return [
        *trained_on(train, evaluated),
        *trusted(train, evaluated),
        *unlabelled(train),
        *empty_classes(train, evaluated),
        *idle_keys(config, steps, samples),
    ]


def trained_on(train: Index, evaluated: Index | None, key: str = "data.eval") -> list[str]:
    """How many images of `key`, open as `evaluated`, are in `data.train` too, in a sentence if there are any."""
    if evaluated is None:
        return []
    held = [
        (shared.known, file.first[shared.one + 1] - file.first[shared.one], file.shard_url(shared.one))
        for file in evaluated.files
        for other in train.files
        for shared in shared_shards(file, other)
    ]
    if not held:
        return []
    known, samples, urls = zip(*held, strict=True)
    are = "are" if all(known) else "are, by keys, labels and sizes,"
    return [
        f"{key}: {sum(samples):,} of {evaluated.samples:,} images {are} in data.train too (shard {urls[0]}): "
        "validation is on what is trained on"
    ]


def trusted(train: Index, evaluated: Index | None) -> list[str]:
    """Which index is taken to number the classes as another does, in a sentence if one is."""
    unnamed = unnamed_text([*train.files, *(evaluated.files if evaluated else ())])
    return [unnamed] if unnamed else []


def unlabelled(train: Index) -> list[str]:
    """How many images of `data.train` have no label, in a sentence if there are any: sigmoid takes them all."""
    count = train.unlabelled
    if not count:
        return []
    return [f"data.train: {count:,} of {train.samples:,} images have no label and are trained as images of no class"]


def empty_classes(train: Index, evaluated: Index | None) -> list[str]:
    """Classes without an image in `data.train`, those of them that `data.eval` asks for, and where there is one class
    alone, a sentence each.
    """
    held, found = train.histogram(), []
    held = np.pad(held, (0, max(0, len(train.classes or ()) - len(held))))
    empty = np.flatnonzero(held == 0)
    if len(empty) == len(held) - 1:
        found.append(
            f"data.train: all images are of class {_named(np.flatnonzero(held), train)}: nothing to tell apart"
        )
    if len(empty):
        found.append(f"data.train: {len(empty):,} of {len(held):,} classes hold no image: {_named(empty, train)}")
    if evaluated is not None:
        asked = evaluated.histogram()
        held = np.pad(held, (0, max(0, len(asked) - len(held))))[: len(asked)]
        strange = np.flatnonzero((asked > 0) & (held == 0))
        if len(strange):
            found.append(
                f"data.eval: {asked[strange].sum():,} of {asked.sum():,} labels are of classes without an image in "
                f"data.train: {_named(strange, evaluated)}"
            )
    return found


def idle_keys(config: RunConfig, steps: int, samples: int) -> list[str]:
    """What the config says and a run of `steps` steps over `samples` makes nothing of, a sentence each."""
    found, optimizer, schedule, data = [], config.optimizer, config.schedule, config.data
    if schedule.warmup_steps >= steps:
        rate = optimizer.lr * (steps - 1) / schedule.warmup_steps
        found.append(
            f"schedule.warmup_steps: {schedule.warmup_steps:,} warm-up steps are not over within the run's {steps:,}: "
            f"the learning rate ends at {rate:.3g} of {optimizer.lr:g}"
            + ("" if rate else ", and no update changes the weights")
        )
    counted = {
        "train.eval_every": data.eval and config.train.eval_every,
        "fewshot.every": config.fewshot and config.fewshot.every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "optimizer.averaging.start_step": optimizer.averaging and optimizer.averaging.start_step,
    }
    beyond = [f"{key} {value:,}" for key, value in counted.items() if value and value > steps]
    if beyond:
        found.append(f"beyond the end of the run's {steps:,} steps: {', '.join(beyond)}")
    lanes = data.lanes or config.train.global_batch
    if lanes * data.chunk > samples and (data.lanes or data.chunk != type(data).model_fields["chunk"].default):
        found.append(
            f"data.chunk, data.lanes: {lanes:,} lanes of {data.chunk:,} samples are more than the {samples:,} of "
            "data.train: their order is hardly shuffled; smaller ones would be right"
        )
    if data.held_out and data.eval is not None:
        found.append(f"data.eval: not validated on, as data.held_out is {data.held_out:g}")
    if config.train.eval_every and data.eval is None and not data.held_out:
        found.append(f"train.eval_every: {config.train.eval_every:,}, but data.eval is not set: nothing is validated")
    spec = config.model.spec()
    if unseen := spec.image_size % spec.patch_size:
        found.append(
            f"model.image_size: the last {unseen} rows and columns of {spec.image_size} px fill no patch of "
            f"model.patch_size {spec.patch_size} and are not seen"
        )
    if config.train.loss == "softmax":
        found += _idle(config.model, "model", ["head_bias"], 'with train.loss "softmax"')
    if schedule.decay == "constant":
        found += _idle(schedule, "schedule", ["final_lr"], 'with schedule.decay "constant"')
    keys = ["momentum"] if optimizer.name == "adamw" else ["betas", "eps"]
    found += _idle(optimizer, "optimizer", keys, f'with optimizer.name "{optimizer.name}"')
    if config.train.guard.then == "stop":
        found += _idle(config.train.guard, "train.guard", ["margin", "rollbacks"], 'with train.guard.then "stop"')
    zero = config.deepspeed.zero_optimization
    late = [name for name in type(zero).model_fields if name.startswith("stage3_") and name in zero.model_fields_set]
    if late and zero.stage < 3:
        found.append(f"deepspeed.zero_optimization: {', '.join(late)} of no effect at stage {zero.stage}")
    return found


def _idle(section: Section, name: str, keys: Sequence[str], where: str) -> list[str]:
    """Those of `keys` that are not at their defaults."""
    fields = type(section).model_fields
    said = [key for key in keys if getattr(section, key) != fields[key].default]
    return [f"{name}.{key}: {getattr(section, key)!r} is of no effect {where}" for key in said]


def _range(first: int, last: int) -> str:
    return f"output {first:,}" if first == last else f"outputs {first:,} … {last:,}"


def _named(labels: np.ndarray, index: Index, most: int = 5) -> str:
    names = index.classes or ()
    few = [f"{label} {names[label]!r}" if label < len(names) else str(label) for label in labels[:most].tolist()]
    return ", ".join(few) + (f" and {len(labels) - most:,} more" if len(labels) > most else "")
