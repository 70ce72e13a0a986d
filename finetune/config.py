"""A fine-tuning config: the task's image size and classes; the rest of the network is the checkpoint's."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationError

from pretrain.errors import InputError
from pretrain.model.section import ModelSection
from pretrain.model.spec import ViTSpec
from pretrain.section import Section, Seeds, each_once, key
from pretrain.stream.section import DataSection
from pretrain.training.config import RunConfig, TrainingConfig


class TaskModel(Section):
    """What the task sets of the network; layers, widths, patch and channels are the checkpoint's."""

    image_size: int | None = key(None, about="Side of the square input, in pixels; null: the checkpoint's.", gt=0)
    num_classes: int = key(about="Classes of the task.", gt=0)
    dropout: float = key(0.0, about="Share of activations dropped while training.", ge=0, lt=1)
    drop_path: float = key(
        0.0,
        about="Stochastic depth: share of a sample's residual branches dropped at the last block, rising linearly from "
        "0 at the first.",
        ge=0,
        lt=1,
    )


class TaskData(DataSection):
    """The task's data, which the network must fit unless the config says otherwise."""

    mismatch: Literal["note", "refuse"] = key(
        "refuse",
        about="What follows where the network has more outputs than the data have classes, or is grey and the images "
        "are not.",
        resume="free",
    )


Rate = Annotated[float, Field(gt=0)]


def _ascending(rates: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(rates))


class SweepSection(Section):
    """The choice of the learning rate on held-out samples, and the runs that follow (paper, Table 4)."""

    lrs: Annotated[tuple[Rate, ...], AfterValidator(each_once), AfterValidator(_ascending)] = key(
        about="Learning rates to choose from, in place of `optimizer.lr`.", resume="free", examples=[[0.003, 0.01]]
    )
    held_out: float = key(about="`data.held_out` of the runs that choose.", gt=0, lt=1)
    metric: Literal["eval/top1", "eval/top5", "averaged/eval/top1", "averaged/eval/top5"] = key(
        "eval/top1", about="The last score of a run, by which the rate is chosen.", resume="free"
    )
    seeds: Seeds | None = key(
        None,
        about="`seed` of each run on all samples with the chosen rate; null: the config's alone.",
        resume="free",
        examples=[[0, 1, 2]],
    )


class FinetuneConfig(TrainingConfig):
    """A fine-tuning run (paper, Table 4)."""

    needs_weights: ClassVar[bool] = True

    data: TaskData = key(TaskData(), about="The shard stream and the augmentation.")
    model: TaskModel = key(about="What the task says of the network.")
    sweep: SweepSection | None = key(
        None,
        about="What `--sweep` does; without it the section is ignored.",
        resume="free",
        examples=[{"lrs": [0.003, 0.01, 0.03, 0.06], "held_out": 0.01}],
    )

    def of(self, network: ViTSpec | None) -> RunConfig:
        """The run that fine-tunes weights of `network`: one linear head, no representation layer.

        Raises:
            InputError: the task's values do not go with the network.
        """
        assert network is not None  # as it needs weights
        task = self.model
        sizes: dict[str, Any] = {
            **{key: getattr(network, key) for key in ModelSection.model_fields if key in ViTSpec.__dataclass_fields__},
            "num_classes": task.num_classes,
            "image_size": task.image_size or network.image_size,
            "dropout": task.dropout,
            "drop_path": task.drop_path,
            "representation_size": None,
        }
        try:
            model = ModelSection(**sizes)
        except ValidationError as error:
            raise InputError(f"config {self.name}: {error.errors()[0]['ctx']['error']}") from None
        return RunConfig(model=model, **{key: getattr(self, key) for key in TrainingConfig.model_fields})
