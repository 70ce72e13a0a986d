"""report.json and the files of predictions: the scores, and all that is needed to get them again."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.evaluation.config import EvaluateConfig
from finetune.evaluation.page import draw_charts, html, markdown
from finetune.evaluation.prediction import Kind
from finetune.evaluation.scores import Predictions, Scores
from finetune.evaluation.sets import LabelledSet, class_names
from pretrain import files
from pretrain.images.transforms import EvalImages
from pretrain.model.arithmetic import dtype_name
from pretrain.record.folder import git_commit, versions
from pretrain.record.reportfolder import REPORT, json_text, write_parts
from pretrain.weights.networks import Network

FOLDER = "evaluation"
CONFUSIONS = 50  # mistakes in report.json; the files of predictions tell all

_RIGHT = (
    "the first of the predictions (top-5: one of the first five) is one of the image's labels; images without a label "
    "are left out, one that does not decode is a miss"
)
_ORDER = (
    "batches are cut by id, the last ones padded: any number of ranks gives the same bits, on processors and with "
    "threads per rank that are alike"
)
_PROBABILITIES = {
    "softmax": "softmax over all outputs",
    "sigmoid": "sigmoid of each output by itself, so that they need not add up to 1",
}
_LOSSES = {
    "softmax": "cross-entropy (negative log-likelihood), not smoothed",
    "sigmoid": "binary cross-entropy summed over classes, not smoothed",
}


@dataclass(frozen=True)
class Result:
    """What a network says of a set, and what that is worth.

    Args:
        sha256: of the network's weights.
        kind: what makes its logits probabilities.
        images: how it sees an image.
    """

    network: Network
    sha256: str
    kind: Kind
    images: EvalImages
    of: LabelledSet
    predictions: Predictions
    scores: Scores


def build_report(
    config: EvaluateConfig, results: Sequence[Result], notes: Sequence[str], run: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of report.json but for `seconds`. `run`: ranks and device."""
    kinds = sorted({one.kind for one in results})
    files_of = file_names(results)
    sets = {one.of.name: one.of for one in results}
    return {
        "name": config.name,
        "protocol": {
            "sets": {name: describe_set(each) for name, each in sets.items()},
            "right": _RIGHT,
            "probabilities": {kind: _PROBABILITIES[kind] for kind in kinds},
            "loss": {kind: _LOSSES[kind] for kind in kinds},
            "calibration": (
                f"expected calibration error: {config.evaluate.bins} bins of equal width over [0, 1], closed above; "
                "the mean over images of |accuracy − mean confidence| of their bin; confidence is the probability of "
                "the first prediction"
            ),
            "arithmetic": f"{config.evaluate.dtype}, batches of {config.evaluate.batch} a rank; {_ORDER}",
        },
        "notes": list(notes),
        "weights": list({one.network.id: describe_weights(one) for one in results}.values()),
        "class_names": class_names(list(sets.values())),
        "results": [
            {
                "weights": one.network.id,
                "set": one.of.name,
                **describe_scores(one.scores),
                "predictions": name,
                "predictions_sha256": lines_sha256(one),
            }
            for one, name in zip(results, files_of, strict=True)
        ],
        "run": {**run, "config": config.model_dump(mode="json")},
        "versions": versions(),
        "git_commit": git_commit(),
    }


def describe_set(each: LabelledSet) -> dict[str, Any]:
    """The report's `protocol.sets` for one."""
    index = each.index
    return {
        "index": [str(file.path) for file in index.files],
        "index_sha256": index.hash,
        "images": index.samples,
        "unlabelled": index.unlabelled,
        "classes": index.num_classes,
        "several_labels": index.longest > 1,
    }


def describe_weights(one: Result) -> dict[str, Any]:
    """The report's `weights` for one."""
    network = one.network
    size = one.images.image_size
    seen = (
        f"the whole image resized to {size}x{size}"
        if one.images.whole
        else f"the shorter side resized to {(16 * size + 7) // 14}, centre crop {size}x{size}"
    )
    return {
        "id": network.id,
        "path": str(network.path),
        "sha256": one.sha256,
        "step": network.source.step,
        "checkpoint": network.source.name,
        "averaged": network.averaged,
        "image_size": size,
        "trained_image_size": network.trained_size,
        "trained_on": network.trained_on or None,
        "model": network.spec.describe(),
        "outputs": network.spec.num_classes,
        "dtype": dtype_name(network.dtype),
        "probabilities": one.kind,
        "preprocessing": f"{seen} (bilinear, antialias, uint8), to [-1, 1]",
    }


def describe_scores(scores: Scores) -> dict[str, Any]:
    """A row of the report's `results`, but for whose it is."""
    confusions = scores.confusions
    return {
        "images": scores.images,
        "unlabelled": scores.unlabelled,
        "unreadable": scores.unreadable,
        "top1": scores.top1,
        "top5": scores.top5,
        "top1_std_error": math.sqrt(scores.top1 * (1 - scores.top1) / scores.images),
        "loss": scores.loss,
        "confidence": scores.confidence,
        "ece": scores.ece,
        "bins": [asdict(one) for one in scores.bins],
        "classes": [asdict(one) for one in scores.classes],
        "confusions": [
            {"label": label, "predicted": predicted, "images": images}
            for label, predicted, images in confusions.commonest(CONFUSIONS)
        ],
    }


def file_names(results: Sequence[Result]) -> list[str]:
    """The name of each result's file of predictions, no two alike."""
    found: list[str] = []
    for one in results:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", one.network.id).strip("-.") or "weights"
        stem = f"predictions_{plain[:100]}" + ("" if one.of.name == "eval" else f"_{one.of.name}")
        names = (f"{stem}{number}.jsonl" for number in ("", *(f"-{count}" for count in range(2, len(results) + 2))))
        found.append(next(name for name in names if name not in found))
    return found


def prediction_lines(one: Result) -> Iterator[bytes]:
    """A line of JSON for each image: id, key, labels, and the first five classes with their probabilities; an image
    that does not decode has `"unreadable": true` instead.
    """
    said = one.predictions
    columns = (said.ids, said.keys, one.of.labels, said.readable, said.classes, said.probabilities)
    for id, key, labels, readable, classes, probabilities in zip(*columns, strict=True):
        line: dict[str, Any] = {"id": int(id), "key": key, "labels": labels[labels >= 0].tolist()}
        if readable:
            # The shortest decimals that are these fp32 numbers.
            line |= {"classes": classes.tolist(), "probabilities": [float(str(value)) for value in probabilities]}
        else:
            line["unreadable"] = True
        yield json.dumps(line).encode() + b"\n"


def lines_sha256(one: Result) -> str:
    """sha256 (hex) of a file of predictions."""
    digest = hashlib.sha256()
    for line in prediction_lines(one):
        digest.update(line)
    return digest.hexdigest()


def write_report(report: Mapping[str, Any], results: Sequence[Result], out: Path) -> Path:
    """Write everything to `out`/evaluation, report.json last. Returns the path of report.html."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for one, name in zip(results, file_names(results), strict=True):
        with files.atomic_write(folder / name) as file:
            file.writelines(prediction_lines(one))
    shown = [one.scores.confusions for one in results if one.of.name == results[0].of.name]
    charts = draw_charts(report, shown)
    parts = {
        **charts,
        "report.md": markdown(report, list(charts)).encode(),
        "report.html": html(report, shown).encode(),
        REPORT: json_text(report).encode(errors="backslashreplace"),  # a path that is no UTF-8, as JSON has it
    }
    write_parts(folder, parts)
    return folder / "report.html"
