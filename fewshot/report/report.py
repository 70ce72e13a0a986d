"""report.json and report.md: the scores, and all that is needed to get them again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewshot.cache import NetworkFeatures, find_baselines, repeated_images
from fewshot.closeup import Closeup
from fewshot.comparison import METHOD, compare
from fewshot.config import FewshotConfig, ProtocolSection
from fewshot.features import headline, layers_of, preprocessing
from fewshot.given import GivenFeatures
from fewshot.probes.table import PROBES
from fewshot.report.charts import draw_charts
from fewshot.report.page import html
from fewshot.report.text import markdown
from fewshot.score import Scores, summarise
from fewshot.task import Draw, Task
from pretrain.index.index import Index
from pretrain.model.arithmetic import dtype_name
from pretrain.record.folder import git_commit, versions
from pretrain.record.reportfolder import REPORT, json_text, write_parts

FOLDER = "report"

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


def describe_networks(features: Sequence[NetworkFeatures]) -> list[dict[str, Any]]:
    """The report's `weights` for networks. `baselines`: for each, the weights whose rows are those of the baseline."""
    return [
        {
            "id": (network := one.network).id,
            "run": network.run,
            "averaged": network.averaged,
            "path": str(network.path),
            "sha256": one.sha256,
            "step": network.source.step,
            "checkpoint": str(network.source.path),
            "image_size": network.spec.image_size,
            "trained_image_size": network.trained_size,
            "trained_on": network.trained_on or None,
            "model": network.spec.describe(),
            "headline": headline(list(one.widths)),
            "preprocessing": preprocessing(network.spec.image_size),
            "widths": one.widths,
            "dtype": dtype_name(network.dtype),
            "baselines": baselines,
        }
        for one, baselines in zip(features, find_baselines(features), strict=True)
    ]


def describe_task(task: Task, repeated: int) -> dict[str, Any]:
    """The report's `protocol.images` for indices. repeated: how many query images are support images too."""

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
        "query": {**describe(task.query), "in_support": repeated, "commonest_class": _commonest(task.query_labels)},
        "note": task.note,
    }


def describe_rows(given: GivenFeatures, draws: Sequence[Draw]) -> dict[str, Any]:
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


def report_networks(
    config: FewshotConfig,
    features: Sequence[NetworkFeatures],
    task: Task,
    scores: Scores,
    device: str,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json for networks. `run`: how it was run, which changes no number."""
    dtype, batch = config.fewshot.dtype, config.fewshot.batch
    exactly = ", products in no TF32" if dtype == "float32" else ", as a run under that type logs its score"
    return build_report(
        config.name,
        config.fewshot,
        scores,
        query_labels=task.query_labels,
        draws=task.draws,
        weights=describe_networks(features),
        images=describe_task(task, repeated_images(next(iter(features[0].files.values())))),
        arithmetic=f"features in {dtype}{exactly}, {batch} images at a time; probes in float64; on {device}",
        run={**run, "config": config.model_dump(mode="json")},
    )


def report_given(
    given: GivenFeatures,
    name: str,
    protocol: ProtocolSection,
    draws: Sequence[Draw],
    scores: Scores,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json for a file of features, which are those of weights `name`. `run`: as for networks."""
    weights = {
        "id": name,
        "run": name,
        "averaged": False,
        "path": str(given.path),
        "sha256": given.sha256,
        "step": None,
        "headline": "given",
        "preprocessing": "none: features as given",
        "widths": {"given": given.features.query.shape[1]},
        "dtype": str(given.features.query.dtype),
        "baselines": {},
    }
    return build_report(
        name,
        protocol,
        scores,
        query_labels=given.query_labels,
        draws=draws,
        weights=[weights],
        images=describe_rows(given, draws),
        arithmetic="features as given; probes in float64",
        run={**run, "config": {"fewshot": protocol.model_dump(mode="json")}},
    )


def build_report(
    name: str,
    protocol: ProtocolSection,
    scores: Scores,
    *,
    query_labels: NDArray[np.int64],
    draws: Sequence[Draw],
    weights: Sequence[Mapping[str, Any]],
    images: Mapping[str, Any],
    arithmetic: str,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json. `run` and the seconds stand together, apart from what is the same every time."""
    preparations = {one["id"]: one["preprocessing"] for one in weights}
    distinct = list(dict.fromkeys(preparations.values()))
    used = list(dict.fromkeys(row.features for row in scores.results))
    described = {layer.name: layer.description for layer in layers_of(used)}
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
            "probes": {probe: PROBES[probe].description for probe in protocol.probes},
            "features": {name: described.get(name, "from a file") for name in used},
            "arithmetic": arithmetic,
        },
        "weights": [dict(one) for one in weights],
        "results": [asdict(row) for row in scores.results],
        "summary": [
            {**asdict(row), "query_std_error": math.sqrt(row.mean * (1 - row.mean) / images["query"]["images"])}
            for row in summarise(scores.results)
        ],
        "comparisons": {
            "method": METHOD,
            "rows": [asdict(row) for row in compare(scores, query_labels, compared_features(weights))],
        },
        "oracle": {"note": _ORACLE, "curves": [asdict(row) for row in scores.sweeps]},
        "run": {**run, "seconds": scores.seconds},
        "versions": versions(),
        "git_commit": git_commit(),
    }


def compared_features(weights: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(weights, features) of what is compared: the first run's newest weights, by their leading feature; then those of
    the other weights, and the other features and the baselines of these.
    """
    led = [one for one in weights if one["headline"]]
    if not led:
        return []
    newest = max((one for one in led if one["run"] == led[0]["run"]), key=lambda one: one["step"] or 0)
    owners = {name: newest["baselines"].get(name, newest["id"]) for name in newest["widths"]}
    features = sorted(owners, key=lambda name: name in newest["baselines"])
    return [
        *((one["id"], one["headline"]) for one in (newest, *led)),
        *((owners[name], name) for name in features),
    ]


def write_report(report: Mapping[str, Any], closeup: Closeup, out: Path) -> Path:
    """Write report.json, its charts, report.md and report.html to `out`/report. Returns the folder."""
    text, charts = json_text(report), draw_charts(report)
    parts = {
        REPORT: text.encode(errors="backslashreplace"),  # a path that is no UTF-8, as JSON has it
        **charts,
        "report.md": markdown(report, list(charts)).encode(),
        "report.html": html(report, closeup).encode(),
    }
    write_parts(out / FOLDER, parts)
    return out / FOLDER
