"""The config section `data`: the shard stream and the augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from pretrain.section import Indices, Section, key
from pretrain.storage.retry import TIMEOUTS, Timeouts

if TYPE_CHECKING:
    from pretrain.images.mixing import Mixing
    from pretrain.images.transforms import TrainImages

Layers = Annotated[int, Field(gt=0)]
Magnitude = Annotated[int, Field(ge=0, le=30)]
Share = Annotated[float, Field(le=1)]


class DataSection(Section):
    """The shard stream and the augmentation. `train` and `eval` are an INDEX or a list that is concatenated."""

    gone: ClassVar[Mapping[str, Any]] = {"decoder": "host"}

    # The stream's state in a checkpoint holds the hash of the index, which a resume checks.
    train: Indices | None = key(
        None,
        about="What is trained on, which a run needs: an index file or a folder of shards that holds one; a list is "
        "concatenated.",
        resume="free",
        examples=[["DIR", "DIR2"]],
    )
    eval: Indices | None = key(
        None, about="What is validated on, as `train`; null: nothing.", resume="measured", examples=[["DIR", "DIR2"]]
    )
    held_out: float = key(
        0.0,
        about="Share of `train` that is not trained on and is validated on in place of `eval`, chosen by hashes of the "
        "samples' keys.",
        ge=0,
        lt=1,
    )
    workers: int = key(4, about="Threads per rank that decode images.", resume="free", gt=0)
    audit: bool = key(False, about="Whether each rank records the ids of the samples it trains on.", resume="free")
    chunk: int = key(8, about="Samples that are read together (g of the order function).", gt=0)
    lanes: int | None = key(
        None,
        about="Chunks that are open at once (V of the order function); null: B·clamp(⌊N/(64·g·B)⌋, 1, 4), with N "
        "samples and a global batch of B.",
        gt=0,
    )
    crop: Literal["torchvision", "tensorflow"] = key(
        "torchvision",
        about="How a crop's area and aspect are drawn; the paper's recipes were tuned with TensorFlow's.",
    )
    crop_area: tuple[float, Share] = key(
        (0.05, 1.0), about="Smallest and largest share of the image's area that a training crop takes."
    )
    crop_aspect: tuple[float, float] = key(
        (3 / 4, 4 / 3), about="Smallest and largest ratio of a training crop's width to its height."
    )
    flip: bool = key(True, about="Whether half of the training images are mirrored.")
    eval_crop: Literal["centre", "whole"] = key(
        "centre",
        about="What of an image is evaluated: the centre after a resize by the shorter side, or all of it, squashed.",
        resume="measured",
    )
    randaugment: tuple[Layers, Magnitude] | None = key(
        None,
        about="RandAugment as [operations, magnitude], made for images of 224 px; null: none.",
        examples=[[2, 10]],
    )
    mixup: float = key(0.0, about="α of mixup's Beta(α, α); 0: no mixup.", ge=0)
    cutmix: float = key(
        0.0,
        about="α of CutMix's Beta(α, α); 0: no CutMix. With data.mixup, a coin decides for each pair of images.",
        ge=0,
    )
    read_ahead_mib: int = key(
        1024, about="MiB of shards per rank that are read beyond what the next batches need.", resume="free", gt=0
    )
    patience_minutes: float = key(
        5,
        about="How long one range of a remote shard is tried for; it must be below train.hang_minutes and "
        "train.slow_minutes.",
        resume="free",
        gt=0,
    )
    mismatch: Literal["note", "refuse"] = key(
        "note",
        about="What follows where the network has more outputs than the data have classes, or is grey and the images "
        'are not (fine-tuning: "refuse").',
        resume="free",
    )
    unreadable_chunks: Literal["stop", "quarantine"] = key(
        "stop", about="Whether a chunk that cannot be read ends the run or is replaced and recorded.", resume="free"
    )
    max_unreadable: float = key(
        0.01,
        about="Share of unreadable images, among about the last 10,000, above which the run ends.",
        resume="free",
        ge=0,
        le=1,
    )

    @field_validator("crop_area", "crop_aspect")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"expected [low, high] with 0 < low <= high, found {list(bounds)}")
        return bounds

    def train_images(self, size: int, channels: int, seed: int) -> TrainImages:
        """How a training image becomes `channels` × `size` × `size`."""
        from pretrain.images.randaugment import RandAugment  # here, as reading a config needs no torch
        from pretrain.images.transforms import TrainImages

        augment = RandAugment(*self.randaugment) if self.randaugment else None
        return TrainImages(size, channels, seed, self.crop_area, self.crop_aspect, self.flip, augment, self.crop)

    def mixing(self, size: int, seed: int) -> Mixing | None:
        """How training images of `size` pixels a side are mixed in pairs; None: they are not."""
        from pretrain.images.mixing import Mixing

        return Mixing(self.mixup, self.cutmix, size, seed) if self.mixup or self.cutmix else None

    def timeouts(self) -> Timeouts:
        """How long is waited for remote shards."""
        return replace(TIMEOUTS, deadline=60 * self.patience_minutes)
