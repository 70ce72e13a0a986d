"""The sections and keys of an evaluation's config."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pretrain.section import FolderName, Indices, Section, key
from pretrain.storage.retry import TIMEOUTS, Timeouts


class DataSection(Section):
    """What is scored. With lists of labels a prediction is right if it is one of the image's labels."""

    eval: Indices | None = key(
        None, about="What is scored: an INDEX or a list that is concatenated.", examples=[["DIR", "DIR2"]]
    )
    real: Indices | None = key(
        None,
        about="What is scored beside or instead of `eval`, its images with lists of labels (ReaL): an INDEX or a list "
        "that is concatenated.",
        examples=[["DIR", "DIR2"]],
    )
    eval_crop: Literal["centre", "whole"] | None = key(
        None,
        about="What of an image is seen: the centre after a resize by the shorter side, or all of it, squashed; null: "
        "as the weights' run evaluates, the centre where that is not recorded.",
    )
    workers: int = key(4, about="Decode threads per rank.", gt=0)
    # Below the 30 minutes for which the other ranks' collectives wait meanwhile.
    patience_minutes: float = key(
        5, about="Minutes for which one range of a remote shard is asked for again.", gt=0, lt=30
    )

    def timeouts(self) -> Timeouts:
        """How long remote shards are waited for."""
        return replace(TIMEOUTS, deadline=60 * self.patience_minutes)


class ModelSection(Section):
    """How the networks are run."""

    image_size: int | None = key(
        None, about="Image size in pixels, to which positions are resized; null: the weights'.", gt=0
    )


class EvaluateSection(Section):
    """How predictions are made and counted."""

    batch: int = key(64, about="Images that a rank computes together.", gt=0)
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "float32", about="Type that the network computes in; a run's, to get the score that it logged."
    )
    probabilities: Literal["softmax", "sigmoid"] | None = key(
        None,
        about="What makes logits probabilities, and so the loss; null: the loss that the weights were trained under, "
        "softmax where that is not recorded.",
    )
    bins: int = key(15, about="Bins of equal width over [0, 1] of the calibration error.", gt=0)


class EvaluateConfig(Section):
    """The evaluation of classifiers."""

    name: FolderName = key(about="Name of the evaluation, whose folder is runs/<name> by default.")
    data: DataSection = key(DataSection(), about="Labelled images.")
    model: ModelSection = key(ModelSection(), about="How the networks are run.")
    evaluate: EvaluateSection = key(EvaluateSection(), about="How predictions are made and counted.")
