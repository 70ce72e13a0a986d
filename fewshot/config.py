"""What a few-shot config may say."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator

from pretrain.section import FolderName, Indices, Section, Seeds, Shots, each_once
from pretrain.storage.retry import TIMEOUTS, Timeouts

PROBES = ("ridge", "logistic", "knn10", "knn20", "nearest_mean")
LAYERS = ("tanh", "pre_tanh", "cls", "mean")  # of a network; the first two have a representation head
BASELINES = ("pixels", "untrained")


class DataSection(Section):
    """What is learned from and what is scored: an INDEX each, or a list that is concatenated."""

    support: Indices | None = Field(default=None, examples=[["DIR", "DIR2"]])
    query: Indices | None = Field(default=None, examples=[["DIR", "DIR2"]])
    workers: int = Field(default=4, gt=0)  # decode threads per rank
    # Of attempts at one range of a remote shard; below the 30 minutes that the other ranks' collectives wait meanwhile.
    patience_minutes: float = Field(default=5, gt=0, lt=30)

    def timeouts(self) -> Timeouts:
        """How long is waited for remote shards."""
        return replace(TIMEOUTS, deadline=60 * self.patience_minutes)


class ModelSection(Section):
    """How the checkpoint's network is used."""

    image_size: int | None = Field(default=None, gt=0)  # null: the checkpoint's; else positions are resized


class ProtocolSection(Section):
    """The protocol. The defaults are big_vision's few-shot evaluator.

    The first probe and the first feature that a network has lead its report; the others follow in their order.
    """

    shots: Shots = (1, 5, 10, 25)
    seeds: Seeds = (0, 1, 2)
    l2: float = Field(default=1024.0, gt=0)  # λ of the ridge, not scaled by images
    probes: tuple[str, ...] = PROBES
    # Layers a network does not have are left out.
    features: tuple[str, ...] = ("tanh", "pre_tanh", "cls", "pixels", "untrained")
    oracle: bool = True  # also the ridge for every λ of 2^-10 … 2^19, as a curve apart
    batch: int = Field(default=64, gt=0)  # images a rank looks at together
    # That the network's features are computed in; a run's, to get the score it logged while it trained.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("probes", "features")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(values)

    @field_validator("probes")
    @classmethod
    def _known_probes(cls, probes: tuple[str, ...]) -> tuple[str, ...]:
        if "sgd" in probes:
            raise ValueError(
                "sgd is not among this version's probes; logistic trains the same linear layer to its optimum"
            )
        return _known(probes, PROBES)

    @field_validator("features")
    @classmethod
    def _known_features(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        return _known(features, (*LAYERS, *BASELINES))


class FewshotConfig(Section):
    """A few-shot evaluation of frozen networks."""

    name: FolderName
    seed: int = Field(default=0, ge=0)  # of the untrained network
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    fewshot: ProtocolSection = ProtocolSection()


def _known(names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"found {name!r}; known: {' '.join(known)}")
    return names
