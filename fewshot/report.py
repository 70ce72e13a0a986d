"""report.json and report.md: the scores, and all that is needed to get them again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fewshot.chart import draw_charts
from fewshot.config import ProtocolSection
from fewshot.draw import Draw
from fewshot.features import preprocessing
from fewshot.probes import DESCRIPTIONS
from fewshot.score import Scores, summarise
from fewshot.store import Given, whole
from fewshot.subject import PIXEL_SIDE, Entry, headline, width
from fewshot.task import Task
from pretrain.run.folder import git_commit, versions
from pretrain.stream.index import Index

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
                "model": entry.spec.describe(),
                "headline": headline(widths),
                "preprocessing": preprocessing(entry.spec.image_size),
                "widths": widths,
                "dtype": "float32",
            }
        )
    return described


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


def describe_task(task: Task) -> dict[str, Any]:
    """The report's `protocol.images` for indices."""

    def describe(index: Index) -> dict[str, Any]:
        return {
            "index": [str(file.path) for file in index.files],
            "index_sha256": index.hash,
            "images": index.samples,
            "classes": index.num_classes,
        }

    return {
        "support": {**describe(task.support), "images_used": len(task.support_ids)},
        "query": describe(task.query),
        "support_is_query": task.support.hash == task.query.hash,
    }


def describe_rows(given: Given, draws: Sequence[Draw]) -> dict[str, Any]:
    """The report's `protocol.images` for a file of features."""
    used = len(np.unique(np.concatenate([draw.ids for draw in draws])))
    return {
        "support": {"images": len(given.support_labels), "classes": given.classes, "images_used": used},
        "query": {"images": len(given.query_labels), "classes": len(np.unique(given.query_labels))},
    }


def build_report(
    name: str,
    protocol: ProtocolSection,
    scores: Scores,
    *,
    draws: Sequence[Draw],
    weights: Sequence[Mapping[str, Any]],
    images: Mapping[str, Any],
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
            "l2": protocol.l2,
            "probes": {probe: DESCRIPTIONS[probe] for probe in protocol.probes},
            "features": {feature: FEATURES[feature] for feature in used},
            "arithmetic": "probes in fp64",
        },
        "weights": [dict(one) for one in weights],
        "results": [asdict(row) for row in scores.results],
        "summary": [asdict(row) for row in summarise(scores.results)],
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
        file.write((json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    charts = draw_charts(report, folder)
    with whole(folder / "report.md") as file:
        file.write(markdown(report, charts).encode())
    return folder / "report.md"


def leading_probe(report: Mapping[str, Any]) -> str:
    """Ridge, or without it the first probe."""
    probes = list(report["protocol"]["probes"])
    return "ridge" if "ridge" in probes else probes[0]


def table(report: Mapping[str, Any]) -> str:
    """The headline for a console: accuracy by feature and shots, a line each; after it what is amiss."""
    probe, shots = leading_probe(report), report["protocol"]["shots"]
    rows = [["weights", "features", *(f"{k}-shot" for k in shots)]]
    for id, feature in _features(report):
        rows.append([id, feature, *(_cell(report, id, probe, feature, k) for k in shots)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_caption(report, probe)]
    for row in rows:
        padded = [cell.rjust(size) for cell, size in zip(row, widths, strict=True)]
        padded[:2] = [cell.ljust(size) for cell, size in zip(row[:2], widths, strict=False)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines + _amiss(report))


def markdown(report: Mapping[str, Any], charts: Sequence[str] = ()) -> str:
    """The content of report.md."""
    protocol, probe = report["protocol"], leading_probe(report)
    shots, seeds = protocol["shots"], protocol["seeds"]
    many = [f"{k}-shot" for k in shots]
    lines = [f"# Few-shot: {report['name']}", "", *_headline(report, probe), "", *_amiss(report), ""]
    lines += [f"## {_caption(report, probe)}", ""]
    lines += _table(
        ["weights", "features", *many],
        [[id, f, *(_cell(report, id, probe, f, k) for k in shots)] for id, f in _features(report)],
    )
    if differences := _differences(report, probe):
        lines += ["", "Ahead of the baselines, in percentage points of the mean:", ""]
        lines += _table(["weights", "difference", *many], differences)
    lines += [f"\n![{chart}]({chart})" for chart in charts if chart != "oracle.png"]

    others = [name for name in protocol["probes"] if name != probe]
    if others:
        lines += ["", "## Other probes", ""]
        lines += _table(
            ["weights", "features", "probe", *many],
            [
                [id, f, name, *(_cell(report, id, name, f, k) for k in shots)]
                for id, f in _features(report)
                for name in others
            ],
        )
    lines += ["", "## Every seed", "", "Accuracy in %.", ""]
    found = {
        (row["weights"], row["features"], row["probe"], row["shots"], row["seed"]): row["accuracy"]
        for row in report["results"]
    }
    lines += _table(
        ["weights", "features", "probe", "shots", *(f"seed {seed}" for seed in seeds)],
        [
            [id, f, name, str(k), *(f"{100 * found[id, f, name, k, seed]:.2f}" for seed in seeds)]
            for id, f in _features(report)
            for name in protocol["probes"]
            for k in shots
        ],
    )
    lines += _oracle(report, "oracle.png" in charts)
    lines += _reproduction(report)
    return "\n".join(lines) + "\n"


def _headline(report: Mapping[str, Any], probe: str) -> list[str]:
    """One sentence for each WEIGHTS: the score at 5 shots, or at the most shots there are."""
    shots = report["protocol"]["shots"]
    k = 5 if 5 in shots else shots[-1]
    lines = []
    for one in report["weights"]:
        feature = next((f for id, f in _features(report) if id == one["id"] and f == one["headline"]), None)
        if feature is not None:
            score = _cell(report, one["id"], probe, feature, k)
            lines.append(f"- **{one['id']}: {score} % at {k} shots** ({probe}, features `{feature}`).")
    return lines


def _amiss(report: Mapping[str, Any]) -> list[str]:
    if not report["protocol"]["images"].get("support_is_query"):
        return []
    return ["The query set is the support set: images that were learned from are among those scored."]


def _differences(report: Mapping[str, Any], probe: str) -> list[list[str]]:
    means = {
        (row["weights"], row["features"], row["shots"]): 100 * row["mean"]
        for row in report["summary"]
        if row["probe"] == probe
    }
    present, rows = set(_features(report)), []
    for one in report["weights"]:
        id, leading = one["id"], one["headline"]
        for baseline in ("pixels", "untrained"):
            if {(id, leading), (id, baseline)} <= present:
                ahead = [means[id, leading, k] - means[id, baseline, k] for k in report["protocol"]["shots"]]
                rows.append([id, f"{leading} - {baseline}", *(f"{points:+.2f}" for points in ahead)])
    return rows


def _oracle(report: Mapping[str, Any], chart: bool) -> list[str]:
    curves = report["oracle"]["curves"]
    if not curves:
        return []
    note = report["oracle"]["note"].capitalize()
    lines = ["", "## The ridge for every λ", "", f"{note}. Accuracy in %, mean over seeds.", ""]
    groups: dict[tuple[str, str, int], list[Sequence[float]]] = {}
    for curve in curves:
        groups.setdefault((curve["weights"], curve["features"], curve["shots"]), []).append(curve["accuracy"])
    lines += _table(
        ["λ", *(f"{id} {feature} {k}-shot" for id, feature, k in groups)],
        [
            [
                f"2^{math.log2(l2):g}",
                *(f"{100 * fmean(seed[at] for seed in seeds):.2f}" for seeds in groups.values()),
            ]
            for at, l2 in enumerate(curves[0]["l2"])
        ],
    )
    return [*lines, "\n![oracle.png](oracle.png)"] if chart else lines


def _reproduction(report: Mapping[str, Any]) -> list[str]:
    protocol, run = report["protocol"], report["run"]
    lines = ["", "## To get this again", ""]
    lines += _table(
        ["weights", "path", "step", "sha256", "features: width", "type", "images"],
        [
            [
                one["id"],
                str(one.get("checkpoint", one["path"])),
                "" if one["step"] is None else str(one["step"]),
                one["sha256"],
                ", ".join(f"{feature}: {size}" for feature, size in one["widths"].items()),
                one["dtype"],
                one["preprocessing"],
            ]
            for one in report["weights"]
        ],
    )
    lines += [""]
    for split in ("support", "query"):
        found = protocol["images"][split]
        lines.append(f"- {split}: " + ", ".join(f"{key} {_plain(value)}" for key, value in found.items()))
    lines += [
        f"- draw: {protocol['draw']}",
        f"- standardised: {protocol['standardised']}",
        f"- λ = {protocol['l2']:g}, not scaled by the number of images",
        *(f"- {name}: {text}" for name, text in protocol["probes"].items()),
        *(f"- features `{name}`: {text}" for name, text in protocol["features"].items()),
        f"- arithmetic: {protocol['arithmetic']}",
        *(f"- {key}: {_plain(value)}" for key, value in run.items() if key != "config"),
        "- wall time: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in report["seconds"].items()),
        "- versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        f"- commit: {report['git_commit'] or 'unknown'}",
        "",
        f"sha256 of the support ids ({protocol['support_ids_hashed']}):",
        "",
    ]
    lines += _table(
        ["shots", "seed", "images", "sha256"],
        [[str(row[key]) for key in ("shots", "seed", "images", "sha256")] for row in protocol["support_ids"]],
    )
    return lines


def _caption(report: Mapping[str, Any], probe: str) -> str:
    protocol = report["protocol"]
    strength = f", λ = {protocol['l2']:g}" if probe == "ridge" else ""
    seeds = protocol["seeds"]
    spread = f"mean ± std over seeds {' '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    images = protocol["images"]["query"]["images"]
    return f"Accuracy in % on {images:,} query images: {probe}{strength}, {spread}"


def _features(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(weights, features) in the order of the rows."""
    return list(dict.fromkeys((row["weights"], row["features"]) for row in report["summary"]))


def _cell(report: Mapping[str, Any], id: str, probe: str, feature: str, shots: int) -> str:
    row = next(
        row
        for row in report["summary"]
        if (row["weights"], row["probe"], row["features"], row["shots"]) == (id, probe, feature, shots)
    )
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
    return f"{100 * row['mean']:.2f}{spread}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
