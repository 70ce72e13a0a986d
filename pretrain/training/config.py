"""The config of a run: its sections, and which of their keys contradict each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from pretrain.checkpoint.section import CheckpointSection
from pretrain.engine.guards import GuardSection
from pretrain.engine.schedule import ScheduleSection
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.model.depth import Freeze, frozen_depth
from pretrain.model.section import ModelSection
from pretrain.model.spec import ViTSpec
from pretrain.record.section import LoggingSection
from pretrain.section import FolderName, Indices, Section, Seeds, Shots, key
from pretrain.stream.section import DataSection, Layers

if TYPE_CHECKING:
    import torch

    from pretrain.engine.layout import Layout
    from pretrain.plan.job import Job


class TrainSection(Section):
    """Length, batch and loss. Exactly one of `steps` and `epochs` is set."""

    global_batch: int = key(about="Images of one step, over all ranks.", gt=0)
    micro_batch: int | None = key(
        None, about="Images per rank and backward pass; null: no accumulation.", resume="free", gt=0
    )
    steps: int | None = key(None, about="Length in steps; null where `epochs` is set.", resume="extendable", gt=0)
    epochs: float | None = key(
        None, about="Length in epochs, rounded to whole steps; null where `steps` is set.", resume="extendable", gt=0
    )
    loss: Literal["sigmoid", "softmax"] = key(
        "softmax", about="Binary cross-entropy summed over classes, or cross-entropy over them."
    )
    label_smoothing: float = key(0.0, about="Share of the target spread evenly over all classes.", ge=0, lt=1)
    freeze: Freeze | None = key(
        None,
        about='What is not trained: "body", all but the head; k, the embedding and the first k blocks; null: all is.',
    )
    activation_checkpointing: Literal["none", "full", "selective"] | Layers = key(
        "none",
        about="What the backward pass computes again: nothing, all of a block, all but its matrix products and "
        "attention, or all of every k-th block.",
        resume="free",
    )
    compile: bool = key(False, about="Whether torch.compile compiles the blocks.", resume="free")
    deterministic: bool = key(
        False,
        about="Whether a GPU's kernels, too, give the same bits each time; those of attention are slower then.",
        resume="free",
    )
    eval_every: int | None = key(None, about="Steps between validations; null: one, at the end.", resume="free", gt=0)
    time_limit_minutes: float | None = key(
        None, about="Minutes after which the run stops with a checkpoint; null: no limit.", resume="free", gt=0
    )
    guard: GuardSection = key(GuardSection(), about="Updates that are skipped.", resume="stated")
    # Everything up to the end of the first step may take half an hour.
    hang_minutes: float = key(
        10.0,
        about="Minutes without progress in a step after which the run ends with the stack of the rank that hangs.",
        resume="free",
        gt=0,
        le=10_000,
    )
    slow_minutes: float = key(15.0, about="The same limit for a save or an evaluation.", resume="free", gt=0, le=10_000)

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"set exactly one of steps and epochs, found steps={self.steps}, epochs={self.epochs}")
        return self


class FewshotSection(Section):
    """Few-shot evaluation while training: the closed-form probe on the frozen features every `every` steps."""

    every: int = key(about="Steps between few-shot evaluations.", resume="measured", gt=0)
    support: Indices = key(
        about="What is learned from: an INDEX or a list.", resume="measured", examples=[["DIR", "DIR2"]]
    )
    query: Indices = key(about="What is scored: an INDEX or a list.", resume="measured", examples=[["DIR", "DIR2"]])
    shots: Shots = key((5,), about="Images of each class to learn from.", resume="measured")
    seeds: Seeds = key((0,), about="Seeds of the draws; the mean over them is logged.", resume="measured")
    l2: float = key(1024.0, about="λ of the ridge regression, not scaled by images.", resume="measured", gt=0)


class TrainingConfig(Section, ABC):
    """The keys that pre-training and fine-tuning share."""

    needs_weights: ClassVar[bool] = False  # whether a run cannot begin without --init

    name: FolderName = key(about="Name of the run, whose folder is `runs/NAME` by default.", resume="free")
    seed: int = key(0, about="Seed of the initial weights, the order and the augmentation.", ge=0, lt=2**53)
    data: DataSection = key(DataSection(), about="The shard stream and the augmentation.")
    train: TrainSection = key(about="Length, batch and loss.")
    optimizer: OptimizerSection = key(about="The optimizer.")
    schedule: ScheduleSection = key(ScheduleSection(), about="The learning rate over the run.")
    checkpoint: CheckpointSection = key(CheckpointSection(), about="When to save, and how many to keep.")
    logging: LoggingSection = key(LoggingSection(), about="What is logged, and how often.")
    deepspeed: DeepSpeedSection = key(
        DeepSpeedSection(),
        about="What DeepSpeed is told beyond the other keys.",
        examples=[{"zero_optimization": {"stage": 1}}],
    )
    fewshot: FewshotSection | None = key(
        None,
        about="Few-shot evaluation while training; null: none.",
        resume="measured",
        examples=[{"every": 1000, "support": "DIR", "query": "DIR2"}],
    )

    @model_validator(mode="after")
    def _patience_ends_first(self) -> TrainingConfig:
        patience, train = self.data.patience_minutes, self.train
        for name, limit in (("hang_minutes", train.hang_minutes), ("slow_minutes", train.slow_minutes)):
            if patience >= limit:
                raise ValueError(
                    f"data.patience_minutes is {patience:g}, train.{name} is {limit:g}: a rank that waits for storage "
                    f"would be ended as one that hangs; a data.patience_minutes below train.{name} would be right"
                )
        return self

    @model_validator(mode="after")
    def _unused_parameters_are_accepted(self) -> TrainingConfig:
        unused = self.deepspeed.zero_optimization.ignore_unused_parameters
        if self.train.freeze is not None and unused is False:
            raise ValueError(
                "deepspeed.zero_optimization.ignore_unused_parameters is false, but what train.freeze freezes gets no "
                "gradient; leave it out"
            )
        return self

    @abstractmethod
    def of(self, network: ViTSpec | None) -> RunConfig:
        """The run's config, given the network whose weights it starts from. Raises InputError: they do not fit."""


class RunConfig(TrainingConfig):
    """The config of a run with its network: a pre-training config, or a fine-tuning config and its checkpoint."""

    model: ModelSection = key(about="The network.")

    def of(self, network: ViTSpec | None) -> RunConfig:
        return self

    def job(self, layout: Layout, dtype: torch.dtype, *, device: Literal["cpu", "cuda"], steps: int | None) -> Job:
        """What memory, time and traffic of the run are a function of.

        Args:
            layout: of its global batch.
            dtype: that the network computes in.
            device: the kind that the ranks compute on.
            steps: of the whole run; None: not known.
        """
        from pretrain.plan.job import Job  # here, as reading a config needs no torch

        train, spec = self.train, self.model.spec()
        return Job(
            spec,
            layout,
            dtype,
            train.loss,
            train.activation_checkpointing,
            train.compile,
            frozen_depth(train.freeze, spec.layers),
            self.optimizer,
            self.deepspeed,
            self.data,
            self.checkpoint,
            steps,
            device,
        )
