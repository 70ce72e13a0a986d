"""report.json and report.md: the scores, and all that is needed to get them again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewshot.chart import draw_charts
from fewshot.config import ProtocolSection
from fewshot.draw import Draw
from fewshot.features import dtype_name, preprocessing
from fewshot.page import markdown
from fewshot.probes import DESCRIPTIONS
from fewshot.score import Scores, summarise
from fewshot.store import Given, whole
from fewshot.subject import PIXEL_SIDE, Entry, headline, width
from fewshot.task import Task
from pretrain.index.index import Index
from pretrain.record.folder import git_commit, versions

REPORT = "report"  # folder

FEATURES = {
    "tanh": "representation, after tanh",
    "pre_tanh": "representation, before tanh",
    "cls": "class token after the final norm (patch tokens averaged, where the network has no class token)",
    "mean": "patch tokens after the final norm, averaged",
    "pixels": f"baseline: the preprocessed image, averaged down to {PIXEL_SIDE}x{PIXEL_SIDE} where larger",
    "untrained": "baseline: the same network freshly initialised, after tanh (without a head: class token)",
    "given": "from a file",
}
_DRAW = (
    "one numpy default_rng(seed) a seed; class by class from 0 it permutes the class's ids in ascending "
    "order; k shots take the first k"
)
_IDS = (
    "canonical ids (row numbers, where features are given), class by class from 0, each class's first k in "
    "the order drawn, as little-endian int64"
)
_STD = "of the accuracies of the seeds' support sets, ddof 1, all scored on the same query images"
_QUERY_ERROR = "sqrt(p(1-p)/M), p the mean accuracy, M the query images: their own binomial noise, which std leaves out"
_ORACLE = "oracle on the query set: each λ scored on the images that would choose it; a curve, not a result"


def describe_entries(entries: Sequence[Entry], features: Sequence[str]) -> list[dict[str, Any]]:
    """The report's `weights` for networks."""
    described = []
    for entry in entries:
        widths = {feature: size for feature in features if (size := width(entry.spec, feature))}
        described.append(
            {
                "id": entry.id,
                "path": str(entry.path),
                "sha256": entry.sha256,
                "step": entry.step,
                "checkpoint": str(entry.source),
                "image_size": entry.spec.image_size,
                "trained_image_size": entry.trained_size,
                "trained_on": entry.trained_on or None,
                "model": entry.spec.describe(),
                "headline": headline(widths),
                "preprocessing": preprocessing(entry.spec.image_size),
                "widths": widths,
                "dtype": dtype_name(entry.dtype),
            }
        )
    return described


def describe_arithmetic(dtype: torch.dtype) -> str:
    """The report's `protocol.arithmetic` for networks that compute in `dtype`."""
    exactly = ", products in no TF32" if dtype is torch.float32 else ", as a run under that type logs its score"
    return f"features in {dtype_name(dtype)}{exactly}; probes in float64"


def describe_given(given: Given, id: str) -> list[dict[str, Any]]:
    """The report's `weights` for a file of features."""
    return [
        {
            "id": id,
            "path": str(given.path),
            "sha256": given.sha256,
            "step": None,
            "headline": "given",
            "preprocessing": "none: features as given",
            "widths": {"given": given.features.query.shape[1]},
            "dtype": str(given.features.query.dtype),
        }
    ]


def describe_task(task: Task, again: int) -> dict[str, Any]:
    """The report's `protocol.images` for indices. again: query images that are support images too."""

    def describe(index: Index) -> dict[str, Any]:
        unlabelled = index.unlabelled
        return {
            "index": [str(file.path) for file in index.files],
            "index_sha256": index.hash,
            "sequence_sha256": index.sequence,
            "images": index.samples - unlabelled,
            "unlabelled": unlabelled,
            "classes": index.num_classes,
        }

    return {
        "support": {**describe(task.support), "images_used": len(task.support_ids)},
        "query": {**describe(task.query), "in_support": again, "commonest_class": _commonest(task.query_labels)},
        "note": task.note,
    }


def describe_rows(given: Given, draws: Sequence[Draw]) -> dict[str, Any]:
    """The report's `protocol.images` for a file of features."""
    used = len(np.unique(np.concatenate([draw.ids for draw in draws])))
    return {
        "support": {"images": len(given.support_labels), "classes": given.classes, "images_used": used},
        "query": {
            "images": len(given.query_labels),
            "classes": len(np.unique(given.query_labels)),
            "in_support": _rows_in(given.features.query, given.features.support),
            "commonest_class": _commonest(given.query_labels),
        },
    }


def _rows_in(rows: NDArray[Any], others: NDArray[Any]) -> int:
    """How many of `rows` are among `others`, bit for bit."""
    known = {hash(row.tobytes()) for row in others.astype(rows.dtype, copy=False)}
    return sum(hash(row.tobytes()) in known for row in rows)


def _commonest(labels: NDArray[np.int64]) -> float:
    """The share of the images that have the most frequent label."""
    return float(np.bincount(labels).max()) / len(labels)


def build_report(
    name: str,
    protocol: ProtocolSection,
    scores: Scores,
    *,
    draws: Sequence[Draw],
    weights: Sequence[Mapping[str, Any]],
    images: Mapping[str, Any],
    arithmetic: str,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json. `run`: what else fixes the numbers (config, ranks, devices)."""
    preparations = {one["id"]: one["preprocessing"] for one in weights}
    distinct = list(dict.fromkeys(preparations.values()))
    used = dict.fromkeys(row.features for row in scores.results)
    return {
        "name": name,
        "protocol": {
            "preprocessing": distinct[0] if len(distinct) == 1 else preparations,
            "images": images,
            "shots": list(protocol.shots),
            "seeds": list(protocol.seeds),
            "draw": _DRAW,
            "support_ids": [
                {"shots": draw.shots, "seed": draw.seed, "images": len(draw.ids), "sha256": draw.sha256}
                for draw in draws
            ],
            "support_ids_hashed": _IDS,
            "standardised": "mean and population standard deviation + 1e-5 of the support set",
            "chance": 1 / images["support"]["classes"],
            "std": _STD,
            "query_std_error": _QUERY_ERROR,
            "l2": protocol.l2,
            "probes": {probe: DESCRIPTIONS[probe] for probe in protocol.probes},
            "features": {feature: FEATURES[feature] for feature in used},
            "arithmetic": arithmetic,
        },
        "weights": [dict(one) for one in weights],
        "results": [asdict(row) for row in scores.results],
        "summary": [
            {**asdict(row), "query_std_error": math.sqrt(row.mean * (1 - row.mean) / images["query"]["images"])}
            for row in summarise(scores.results)
        ],
        "oracle": {"note": _ORACLE, "curves": [asdict(row) for row in scores.sweeps]},
        "seconds": scores.seconds,
        "run": dict(run),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def write_report(report: Mapping[str, Any], out: Path) -> Path:
    """Write report.json, charts (where matplotlib is installed) and report.md to `out`/report.

    Returns the path of report.md.
    """
    folder = out / REPORT
    with whole(folder / "report.json") as file:
        file.write(_json(report).encode(errors="backslashreplace"))  # a path that is no UTF-8, as JSON has it
    charts = draw_charts(report, folder)
    with whole(folder / "report.md") as file:
        file.write(markdown(report, charts).encode())
    return folder / "report.md"


def _json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def set_aside(report: Mapping[str, Any], out: Path) -> Path | None:
    """Rename what lies in place of `out`/report to report-1, report-2, … unless it is this very report, made before.

    Returns:
        where it lies now; None where there was nothing, or the same.
    """
    folder = out / REPORT
    if not os.path.lexists(folder) or _read(folder / "report.json") == _lasting(json.loads(_json(report))):
        return None
    other = next(path for number in count(1) if not os.path.lexists(path := out / f"{REPORT}-{number}"))
    os.rename(folder, other)
    return other


def _read(path: Path) -> dict[str, Any] | None:
    """What lasts of the report in a file; None where it holds none."""
    try:
        return _lasting(json.loads(path.read_bytes()))
    except (OSError, ValueError, AttributeError):
        return None


def _lasting(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what another start of the same command may change."""
    return {key: value for key, value in report.items() if key not in ("seconds", "run", "versions", "git_commit")}
