"""What a run takes: its data opened, everything checked, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.engine.engine import Layout, batch_layout, precision
from pretrain.engine.schedule import Schedule
from pretrain.errors import InputError
from pretrain.images.decode import DeviceDecoder
from pretrain.images.mixup import check_pairs
from pretrain.images.randaugment import RandAugment
from pretrain.images.transforms import TrainImages
from pretrain.index.compare import check_classes, check_names
from pretrain.index.index import Index
from pretrain.model.spec import ViTSpec
from pretrain.ranks import collectives
from pretrain.ranks.collectives import World
from pretrain.record.folder import RunFolder
from pretrain.run.config import RunConfig, TrainingConfig
from pretrain.run.evaluation import Evaluator, Validation
from pretrain.run.loss import Loss, choose_loss
from pretrain.run.notes import check_fit, empty_classes, idle_keys, trained_on, trusted, unlabelled
from pretrain.run.origin import Origin
from pretrain.run.resume import resolved
from pretrain.storage.retry import Timeouts
from pretrain.stream.order import Order

_REMOTE_CHECKED = 64  # shards, spread over the index


@dataclass(frozen=True)
class Setup:
    """A run whose config, data and layout go together: what it takes, before anything is built."""

    recipe: TrainingConfig  # as it was read
    config: RunConfig  # with the network
    folder: RunFolder
    world: World
    index: Index
    layout: Layout
    schedule: Schedule
    order: Order
    images: TrainImages
    loss_of: Loss
    dtype: torch.dtype
    evaluators: Sequence[Evaluator]
    notes: Sequence[str]  # of rank 0
    resolved: dict[str, Any]  # the config, as checkpoints keep it
    origin: Origin | None = None  # what the run began from, once that is known; None also where it was not recorded


def prepare(
    recipe: TrainingConfig,
    network: ViTSpec | None,
    folder: RunFolder,
    world: World,
    evaluators: Sequence[Callable[[], Evaluator]],
) -> Setup:
    """Open the data and check that they, the config and the ranks go together. Collective.

    Args:
        network: of the weights that the run begins or began from, where it does from any.
        evaluators: make those that run beside validation.

    Raises:
        InputError: they do not.
    """
    config = recipe.of(network)
    data, spec, dtype = config.data, config.model.spec(), precision(config.deepspeed)
    index = _open_index(data.train, "data.train", spec.num_classes, world, data.timeouts())
    layout = batch_layout(config.train.global_batch, config.train.micro_batch, world.size)
    steps = run_steps(config, index.samples)
    evaluated = open_eval(config, world, index)
    notes = collectives.together(lambda: check_fit(config, index, evaluated) if world.main else [])
    if world.main:
        notes += [
            *trained_on(index, evaluated),
            *trusted(index, evaluated),
            *unlabelled(index),
            *empty_classes(index, evaluated),
            *idle_keys(config, steps, index.samples),
        ]
    if data.mixup:
        check_pairs(layout.micro_batch)
    if data.decoder == "device":
        if world.device.type != "cuda":
            raise InputError(
                f'data.decoder: "device" decodes JPEGs on a CUDA device, this run is on {world.device.type}; set "host"'
            )
        collectives.together(DeviceDecoder(world.device).check)
    return Setup(
        recipe,
        config,
        folder,
        world,
        index,
        layout,
        Schedule(config.schedule, config.optimizer.lr, steps),
        Order(index.samples, layout.global_batch, config.seed, data.chunk, data.lanes),
        TrainImages(
            spec.image_size,
            spec.channels,
            config.seed,
            data.crop_area,
            data.crop_aspect,
            data.flip,
            RandAugment(*data.randaugment) if data.randaugment else None,
            data.crop,
        ),
        choose_loss(config.train.loss, index.one_label, config.train.label_smoothing),
        dtype,
        [*validation(config, world, layout, evaluated), *(make() for make in evaluators)],
        notes,
        resolved(config, steps, dtype),
    )


def run_steps(config: RunConfig, samples: int) -> int:
    """`train.steps`, or round(epochs · samples / global batch)."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None
    steps = round(config.train.epochs * samples / config.train.global_batch)
    if steps < 1:
        raise InputError(
            f"train.epochs: {config.train.epochs} of {samples} samples in batches of {config.train.global_batch} is no "
            "whole step; train longer, or set a smaller train.global_batch"
        )
    return steps


def open_eval(config: RunConfig, world: World, trained: Index) -> Index | None:
    """`data.eval`, if it is set, whose classes must be those that are trained on. Collective."""
    if config.data.eval is None:
        return None
    return _open_index(
        config.data.eval, "data.eval", config.model.num_classes, world, config.data.timeouts(), named_as=trained
    )


def validation(config: RunConfig, world: World, layout: Layout, index: Index | None) -> list[Evaluator]:
    """Validation on `data.eval`, open as `index`, if there is one."""
    if index is None:
        return []
    # Softmax has no loss for several labels an image, as ReaL's are; images without a label are left out anyway.
    several = config.train.loss == "softmax" and index.longest > 1
    return [
        Validation(
            index,
            None if several else choose_loss(config.train.loss, one_label=True),
            world,
            image_size=config.model.image_size,
            channels=config.model.channels,
            whole=config.data.eval_crop == "whole",
            batch=layout.micro_batch,
            workers=config.data.workers,
            timeouts=config.data.timeouts(),
            dtype=precision(config.deepspeed),
            every=config.train.eval_every,
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
