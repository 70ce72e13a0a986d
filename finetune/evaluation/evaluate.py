"""One network on the labelled sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetune.evaluation.config import EvaluateConfig
from finetune.evaluation.prediction import Kind, predict
from finetune.evaluation.report import Result
from finetune.evaluation.scores import score
from finetune.evaluation.sets import LabelledSet
from pretrain.errors import InputError
from pretrain.images.transforms import EvalImages
from pretrain.ranks.collectives import World, together
from pretrain.weights.load import sees_whole
from pretrain.weights.networks import Network
from pretrain.weights.weights import Weights


def evaluate(network: Network, sets: Sequence[LabelledSet], config: EvaluateConfig, world: World) -> list[Result]:
    """Score a network on each set: the results, on rank 0; elsewhere none. Collective.

    Raises:
        InputError: its classification layer is untrained; as `predict`.
    """
    weights = together(lambda: _read(network))
    model = weights.model(network.spec.image_size).to(network.dtype).to(world.device)
    kind, images = kind_of(network, config), images_of(network, config)
    results = []
    for one in sets:
        doing = f"{network.id} on {one.key}"
        said = predict(model, one.index, images, kind, config, world, doing=doing)
        if said is not None:
            scores = score(said, one.labels, config.evaluate.bins)
            results.append(Result(network, weights.sha256, kind, images, one, said, scores))
    return results


def kind_of(network: Network, config: EvaluateConfig) -> Kind:
    """What makes its logits probabilities: what the config says, else the loss that it was trained under."""
    recorded = network.source.config.get("train", {}).get("loss")
    return config.evaluate.probabilities or ("sigmoid" if recorded == "sigmoid" else "softmax")


def images_of(network: Network, config: EvaluateConfig) -> EvalImages:
    """How it sees an image: what the config says, else as its run evaluates."""
    crop = config.data.eval_crop
    whole = crop == "whole" if crop else sees_whole(network.source.config)
    return EvalImages(network.spec.image_size, network.spec.channels, whole)


def _read(network: Network) -> Weights:
    weights = network.source.read(network.averaged)
    if not torch.count_nonzero(weights.tensors["head.weight"]):
        raise InputError(
            f"weights {network.path}: the classification layer is all zeros, so it has learned no class; fine-tune the "
            "network first (launch/finetune.py), or score its features (launch/fewshot.py)"
        )
    return weights
