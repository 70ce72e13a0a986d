"""What a run takes: its data opened, everything checked, before anything is built."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil, log2
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import InputError
from pretrain.images.mixing import check_pairs
from pretrain.images.transforms import EvalImages, TrainImages
from pretrain.index.compare import check_classes, check_names
from pretrain.index.index import Index
from pretrain.model.spec import ViTSpec
from pretrain.plan.measured import Expected, expected
from pretrain.plan.peak import device_name, unlisted
from pretrain.ranks import collectives
from pretrain.ranks.collectives import World, all_gather_list
from pretrain.record.folder import RunFolder
from pretrain.storage.retry import Timeouts
from pretrain.stream.heldout import hold_out
from pretrain.stream.loader import LoaderOptions, TrainLoader
from pretrain.stream.order import Order
from pretrain.training.config import RunConfig, TrainingConfig
from pretrain.training.evaluation import Evaluator, Validation, check_best
from pretrain.training.loss import choose_loss
from pretrain.training.notes import check_fit, run_notes
from pretrain.training.origin import Origin
from pretrain.training.recipe import Recipe
from pretrain.training.resume import resolved

_REMOTE_CHECKED = 64  # shards, spread over the index


@dataclass(frozen=True)
class Setup:
    """A run that was checked and is ready to be built: its config, data and layout fit."""

    as_read: TrainingConfig  # a fine-tuning config names no network: `config` has the checkpoint's
    config: RunConfig
    folder: RunFolder
    world: World
    index: Index
    order: Order
    trained: NDArray[np.int64] | None  # canonical ids that the order is of; None: all
    images: TrainImages
    recipe: Recipe
    expected: Expected | None  # what a rank will take; None: so little that it was not planned
    evaluators: Sequence[Evaluator]
    notes: Sequence[str]  # of rank 0
    resolved: dict[str, Any]  # the config, as checkpoints keep it
    origin: Origin | None = None  # what the run began from, once that is known; None also where it was not recorded


def prepare(
    as_read: TrainingConfig,
    network: ViTSpec | None,
    folder: RunFolder,
    world: World,
    evaluators: Sequence[Callable[[RunConfig], Evaluator]],
) -> Setup:
    """Open the data and check that they, the config and the ranks go together. Collective.

    Args:
        network: of the weights that the run begins or began from, where it does from any.
        evaluators: make those that run beside validation, given the run's config.

    Raises:
        InputError: they do not.
    """
    config = as_read.of(network)
    data, spec = config.data, config.model.spec()
    index = _open_index(data.train, "data.train", spec.num_classes, world, data.timeouts())
    trained, held = collectives.together(lambda: hold_out(index, data.held_out)) if data.held_out else (None, None)
    samples = index.samples if trained is None else len(trained)
    recipe = Recipe.of(config, index, world.size, samples)
    evaluated = None if data.held_out else _open_eval(config, world, index)
    scored = index if data.held_out else evaluated
    notes = collectives.together(lambda: check_fit(config, index, evaluated) if world.main else [])
    if world.main:
        notes += run_notes(config, recipe.steps, index, evaluated, samples)
    if data.mixup or data.cutmix:
        check_pairs(recipe.layout.micro_batch)
    evaluating = [*_validation(config, recipe, world, scored, held), *(make(config) for make in evaluators)]
    if config.checkpoint.best is not None:
        check_best(config.checkpoint.best, evaluating, averages=config.optimizer.averaging is not None)
    return Setup(
        as_read,
        config,
        folder,
        world,
        index,
        Order(samples, recipe.layout.global_batch, config.seed, data.chunk, data.lanes),
        trained,
        data.train_images(spec.image_size, spec.channels, config.seed),
        recipe,
        _expected(config, recipe, world, index),
        evaluating,
        notes,
        resolved(config, recipe.steps, recipe.dtype),
    )


def _expected(config: RunConfig, recipe: Recipe, world: World, index: Index) -> Expected | None:
    """What a rank will take. Collective. Raises InputError: more than there is."""
    device: Literal["cpu", "cuda"] = "cpu" if world.device.type == "cpu" else "cuda"
    job = config.job(recipe.layout, recipe.dtype, device=device, steps=recipe.steps)
    return expected(job, world, index.bytes / index.samples)


def loader_options(setup: Setup) -> LoaderOptions:
    """How this rank loads what the run trains on."""
    world, data = setup.world, setup.config.data
    on_host = world.device.type == "cpu"
    return LoaderOptions(
        world.rank,
        world.size,
        data.workers,
        data.read_ahead_mib << 20,
        # Masked in either case: the quarantine ends the run, on all ranks together.
        unreadable_chunks="stop" if data.unreadable_chunks == "stop" else "mask",
        pin=not on_host,
        floats=on_host,  # an accelerator is sent bytes, a quarter of them
        timeouts=data.timeouts(),
    )


def open_loader(setup: Setup, start: int) -> TrainLoader:
    """This rank's micro-batches from step `start` (from 0) to the run's end."""
    return TrainLoader(
        setup.index,
        setup.order,
        setup.images,
        loader_options(setup),
        micro_batch=setup.recipe.layout.micro_batch,
        start_step=start,
        stop_step=setup.recipe.steps,
        mixing=setup.config.data.mixing(setup.images.image_size, setup.config.seed),
        trained=setup.trained,
    )


def _open_eval(config: RunConfig, world: World, trained: Index) -> Index | None:
    """`data.eval`, if it is set, whose classes must be those that are trained on. Collective."""
    if config.data.eval is None:
        return None
    return _open_index(
        config.data.eval, "data.eval", config.model.num_classes, world, config.data.timeouts(), named_as=trained
    )


def _validation(
    config: RunConfig, recipe: Recipe, world: World, index: Index | None, ids: NDArray[np.int64] | None
) -> list[Evaluator]:
    """Validation on `ids` of `index` (None: on all of it), if there is one."""
    if index is None:
        return []
    # Softmax has no loss for several labels an image, as ReaL's are; images without a label are left out anyway.
    several = config.train.loss == "softmax" and index.longest > 1
    return [
        Validation(
            index,
            None if several else choose_loss(config.train.loss, one_label=True),
            world,
            config.data,
            EvalImages(config.model.image_size, config.model.channels, config.data.eval_crop == "whole"),
            batch=recipe.layout.micro_batch,
            dtype=recipe.dtype,
            every=config.train.eval_every,
            ids=ids,
        )
    ]


def _open_index(
    paths: str | tuple[str, ...] | None,
    key: str,
    num_classes: int,
    world: World,
    timeouts: Timeouts,
    named_as: Index | None = None,
) -> Index:
    """The index that a config key names, its shards in place and its labels in the network's classes. Collective.

    named_as: that of `data.train`, whose classes must be this one's.
    """
    if paths is None:
        raise InputError(
            f"{key}: not set; give a folder of shards with its index, as made by "
            f"`python launch/shards.py build SOURCE DIR`, e.g. {key}=DIR"
        )

    index = collectives.together(lambda: Index.open(paths))
    check_index(index, key, world, timeouts)
    index.check_distinct()
    check_names(index.files)
    if named_as is not None:  # before the number of classes: other names number others
        check_classes(named_as.classes, index.classes, "data.train", key)
    if index.num_classes > num_classes:
        raise InputError(
            f"{key}: {paths} has labels up to {index.num_classes - 1}, model.num_classes {num_classes} allows up "
            f"to {num_classes - 1}; set model.num_classes={index.num_classes}"
        )
    return index


def check_index(index: Index, key: str, world: World, timeouts: Timeouts | None = None, *, files: bool = True) -> None:
    """Refuse an index that is damaged, or whose shards (unless `files` is False) are not in place. Collective.

    Every node has a file of its own, and a stale copy on one would stand for other samples: all must hold the same.

    Raises:
        InputError: the same on every rank; StorageError where a shard could not be asked for, for now.
    """

    def check() -> None:
        if files:
            # One rank a node asks for every local shard, one rank of all for some of the remote ones: a thousand ranks
            # that ask for 10⁵ each are an attack on the storage. What has changed since is found when it is read.
            local, remote = None if world.local_rank == 0 else 0, _REMOTE_CHECKED if world.main else 0
            index.check_files(local=local, remote=remote, timeouts=timeouts)
        if world.local_rank == 0:
            index.check_content()

    collectives.together(check)
    collectives.require_same(index.hash, f"{key}: the index")


def machines(setup: Setup) -> dict[str, Any]:
    """What the event `start` tells of a run, as a resume may change it. Collective.

    On what it trains and how it is laid out; what its files are to hold: lines of metrics, learning rates, an audit.
    """
    config, layout, schedule = setup.config, setup.recipe.layout, setup.recipe.schedule
    return {
        "ranks": layout.ranks,
        "hosts": len(set(all_gather_list([socket.gethostname()]))),
        "device": device_name(setup.world.device),
        "torch": version("torch"),
        "zero_stage": config.deepspeed.stage,
        "micro_batch": layout.micro_batch,
        "global_batch": layout.global_batch,
        "steps": schedule.steps,
        "lr": schedule.lr,
        "schedule": schedule.section.model_dump(mode="json"),
        "logging_every": config.logging.every,
        "audit": config.data.audit,
    }


def headline(setup: Setup, start: int, origin: str) -> str:
    """Of a run that starts after `start` steps; `origin` tells from which weights."""
    config, index, recipe, layout = setup.config, setup.index, setup.recipe, setup.recipe.layout
    spec, device = config.model.spec(), setup.world.device
    samples = setup.order.samples
    held_out = f" ({index.samples - samples:,} held out)" if samples < index.samples else ""
    epochs = recipe.steps * layout.global_batch / samples
    lines = [
        f"{config.name}: {'; '.join(filter(None, (spec.near(), spec.describe(), origin)))}",
        f"data: {samples:,} samples in {len(index.shards):,} shards{held_out}; steps {start:,} to {recipe.steps:,}, "
        f"{epochs:.4g} epochs",
        f"batch {layout.global_batch} = {layout.ranks} ranks × {layout.accumulation} accumulation × micro-batch "
        f"{layout.micro_batch}; {str(recipe.dtype).removeprefix('torch.')}, ZeRO {config.deepspeed.stage}, "
        f"{device.type}",
    ]
    if unhashed := index.unhashed():
        lines.append(f"note: content of the shards: {unhashed}")
    lines += [f"note: {note}" for note in setup.notes]
    if short := _short_read_ahead(setup):
        lines.append(f"note: {short}")
    if config.logging.peak_tflops is None:
        lines += unlisted(device, recipe.dtype)
    return "\n".join(lines)


def _short_read_ahead(setup: Setup) -> str:
    """Where a rank's lanes, which all change chunk at about the same time, need more than may be read ahead."""
    order, data = setup.order, setup.config.data
    samples = order.lane_count * order.chunk / setup.world.size
    needed = samples * setup.index.bytes / setup.index.samples / 2**20
    if needed <= data.read_ahead_mib:
        return ""
    return (
        f"{order.lane_count:,} lanes of {order.chunk} samples are {needed:,.0f} MiB a rank; with "
        f"data.read_ahead_mib={data.read_ahead_mib} training may wait each time they change chunk; "
        f"{2 ** ceil(log2(needed))} would do, or fewer data.lanes in a new run"
    )
