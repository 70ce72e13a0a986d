"""The sections and keys of a few-shot config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import field_validator

from fewshot.features import BLOCK_FORMS, LAYERS, find_layer, nearest_layer
from fewshot.probes.table import PROBES
from pretrain.section import FolderName, Indices, Section, Seeds, Shots, each_once, key
from pretrain.storage.retry import TIMEOUTS, Timeouts

_LINEAR = tuple(probe.name for probe in PROBES.values() if probe.linear)


class DataSection(Section):
    """The support set, which is learned from, and the query set, which is scored."""

    support: Indices | None = key(
        None, about="What is learned from: an INDEX or a list that is concatenated.", examples=[["DIR", "DIR2"]]
    )
    query: Indices | None = key(
        None, about="What is scored: an INDEX or a list that is concatenated.", examples=[["DIR", "DIR2"]]
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
    """How the checkpoint's network is run."""

    image_size: int | None = key(
        None, about="Image size in pixels, to which positions are resized; null: the checkpoint's.", gt=0
    )


class ProtocolSection(Section):
    """The protocol. The defaults are those of big_vision's few-shot evaluator.

    The first probe, and the first feature that is no baseline, lead the report; the others follow in their order.
    """

    shots: Shots = key((1, 5, 10, 25), about="Support images of each class.")
    seeds: Seeds = key((0, 1, 2), about="Seeds of the draws of support images.")
    l2: float = key(1024.0, about="λ of the ridge regression, not scaled by images.", gt=0)
    probes: tuple[str, ...] = key(tuple(PROBES), about=f"Probes to fit, of {' '.join(PROBES)}.")
    features: tuple[str, ...] = key(
        ("tanh", "pre_tanh", "cls", "pixels", "untrained"),
        about=f"Features to probe, of {' '.join(LAYERS)} {BLOCK_FORMS}. tanh and pre_tanh are left out of a "
        "network without a representation head; a block that it does not have is refused.",
    )
    save_probes: tuple[str, ...] = key(
        _LINEAR,
        about=f"Probes whose fits on each network's leading feature are saved, of {' '.join(_LINEAR)}, where "
        "fewshot.probes names them; []: none.",
    )
    oracle: bool = key(True, about="Whether the report also shows the ridge for every λ of 2^-10 to 2^19.")
    batch: int = key(64, about="Images that a rank computes together.", gt=0)
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "float32", about="Type that features are computed in; a run's, to get the score that it logged."
    )

    @field_validator("probes", "features")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(values)

    @field_validator("probes")
    @classmethod
    def _known_probes(cls, probes: tuple[str, ...]) -> tuple[str, ...]:
        return _known(probes, PROBES)

    @field_validator("save_probes")
    @classmethod
    def _linear_probes(cls, probes: tuple[str, ...]) -> tuple[str, ...]:
        for name in probes:
            if name not in _LINEAR:
                raise ValueError(f"found {name!r}; those that can be saved, being linear: {' '.join(_LINEAR)}")
        return probes

    @field_validator("features")
    @classmethod
    def _known_features(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        for name in features:
            if find_layer(name) is None:
                like = nearest_layer(name)
                meant = f", is {like} meant?" if like else ";"
                raise ValueError(f"found {name!r}{meant} known: {' '.join(LAYERS)} {BLOCK_FORMS}")
        return features


class FewshotConfig(Section):
    """A few-shot evaluation of frozen networks."""

    name: FolderName = key(about="Name of the evaluation, whose folder is runs/<name> by default.")
    seed: int = key(0, about="Seed of the untrained network.", ge=0)
    data: DataSection = key(DataSection(), about="Support and query images.")
    model: ModelSection = key(ModelSection(), about="How the networks are run.")
    fewshot: ProtocolSection = key(ProtocolSection(), about="The protocol.")


def _known(names: tuple[str, ...], known: Mapping[str, Any]) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"found {name!r}; known: {' '.join(known)}")
    return names
