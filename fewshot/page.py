"""A report as people read it: the console's table and report.md."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pretrain.console import printable

_ENDED = "†"  # beside an accuracy of a probe that was not trained to its end
# What Markdown would read as markup, "_" where it is not within a word.
_MARKUP = re.compile(r"[\\`*\[\]<>|&$~]|(?<!\w)_|_(?!\w)")


def leading_probe(report: Mapping[str, Any]) -> str:
    """The first that the protocol names."""
    return next(iter(report["protocol"]["probes"]))


def table(report: Mapping[str, Any]) -> str:
    """The headline for a console: accuracy by feature and shots, a line each; after it what is amiss."""
    probe, shots = leading_probe(report), report["protocol"]["shots"]
    rows = [["weights", "features", *(f"{k}-shot" for k in shots)]]
    for id, feature in _features(report):
        rows.append([id, feature, *(_cell(report, id, probe, feature, k) for k in shots)])
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_caption(report, probe)]
    for row in rows:
        padded = [cell.rjust(size) for cell, size in zip(row, widths, strict=True)]
        padded[:2] = [cell.ljust(size) for cell, size in zip(row[:2], widths, strict=False)]
        lines.append("  ".join(padded).rstrip())
    lines += [
        f"{printable(one['id'])}: {printable(str(one['checkpoint']))}"
        for one in report["weights"]
        if "checkpoint" in one
    ]
    return "\n".join([*lines, *_reading(report, [probe]), *_amiss(report)])


def markdown(report: Mapping[str, Any], charts: Sequence[str] = ()) -> str:
    """The content of report.md."""
    protocol, probe = report["protocol"], leading_probe(report)
    shots, seeds = protocol["shots"], protocol["seeds"]
    many = [f"{k}-shot" for k in shots]
    lines = [
        f"# Few-shot: {_literal(report['name'])}",
        "",
        *_headline(report, probe),
        "",
        *map(_literal, _amiss(report)),
        "",
    ]
    lines += [f"## {_caption(report, probe)}", ""]
    lines += _table(
        ["weights", "features", *many],
        [[id, f, *(_cell(report, id, probe, f, k) for k in shots)] for id, f in _features(report)],
    )
    lines += ["", *(f"- {line}" for line in _reading(report, [probe]))]
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
        lines += ["", *(f"- {line}" for line in _reading(report, others))]
    lines += ["", "## Every seed", "", "Accuracy in %.", ""]
    found = {
        (row["weights"], row["features"], row["probe"], row["shots"], row["seed"]): f"{100 * row['accuracy']:.2f}"
        + ("" if row["converged"] else _ENDED)
        for row in report["results"]
    }
    lines += _table(
        ["weights", "features", "probe", "shots", *(f"seed {seed}" for seed in seeds)],
        [
            [id, f, name, str(k), *(found[id, f, name, k, seed] for seed in seeds)]
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
            lines.append(f"- **{_literal(one['id'])}: {score} % at {k} shots** ({probe}, features `{feature}`).")
    return lines


def _reading(report: Mapping[str, Any], probes: Sequence[str]) -> list[str]:
    """What the numbers of a table of `probes` mean, a line each."""
    protocol, rows = report["protocol"], [row for row in report["summary"] if row["probe"] in probes]
    seeds, query = protocol["seeds"], protocol["images"]["query"]
    low, high = (100 * pick(row["query_std_error"] for row in rows) for pick in (min, max))
    return [
        f"±: standard deviation (ddof 1) over the draws of support images of seeds {' '.join(map(str, seeds))}, all "
        f"scored on the same {query['images']:,} query images"
        if len(seeds) > 1
        else f"one draw of support images, of seed {seeds[0]}: how much another would differ is not known",
        "the query images' own noise, which is not in it: binomial standard error sqrt(p(1-p)/"
        f"{query['images']}), here {low:.2f} to {high:.2f} points",
        f"chance: {100 * protocol['chance']:.2f}; the commonest class is {100 * query['commonest_class']:.2f} % of the "
        "query images",
    ]


def _amiss(report: Mapping[str, Any]) -> list[str]:
    images = report["protocol"]["images"]
    lines = [
        f"{images[split]['unlabelled']:,} images of the {split} set have no label and are not {used}."
        for split, used in (("support", "learned from"), ("query", "scored"))
        if images[split].get("unlabelled")
    ]
    if again := images["query"].get("in_support"):
        scored = images["query"]["images"]
        lines.append(
            f"{again:,} of {scored:,} query images are among the support images that were drawn: what is learned from "
            "is scored."
        )
    if images.get("note"):
        lines.append(f"{images['note']}.")
    # A run that recorded no content of its shards has the hash of their sequence.
    told = {
        images["query"].get("index_sha256"): "",
        images["query"].get("sequence_sha256"): ", by keys, labels and sizes",
    }
    lines += [
        f"{one['id']} was trained on the images of the query set{told[one['trained_on']]}."
        for one in report["weights"]
        if one.get("trained_on") and one["trained_on"] in told
    ]
    unconverged = [row for row in report["results"] if not row["converged"]]
    for probe in dict.fromkeys(row["probe"] for row in unconverged):
        fits = [row for row in report["results"] if row["probe"] == probe]
        ended = [row for row in unconverged if row["probe"] == probe]
        lines.append(
            f"{probe}: {len(ended)} of {len(fits)} fits ended before their optimum, after the most iterations; their "
            f"accuracies ({_ENDED}) are not the probe's."
        )
    return lines


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
        lines.append(f"- {split}: " + ", ".join(f"{key} {_literal(_plain(value))}" for key, value in found.items()))
    lines += [
        f"- draw: {protocol['draw']}",
        f"- standardised: {protocol['standardised']}",
        f"- λ = {protocol['l2']:g}, not scaled by the number of images",
        *(f"- {name}: {_literal(text)}" for name, text in protocol["probes"].items()),
        *(f"- features `{name}`: {text}" for name, text in protocol["features"].items()),
        f"- arithmetic: {protocol['arithmetic']}",
        *(f"- {key}: {_literal(_plain(value))}" for key, value in run.items() if key != "config"),
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
    kinds = sorted({one["dtype"] for one in report["weights"]} & {"bfloat16", "float16"})
    arithmetic = f", features in {' and '.join(kinds)}" if kinds else ""
    return f"Accuracy in % on {images:,} query images: {probe}{strength}, {spread}{arithmetic}"


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
    return f"{100 * row['mean']:.2f}{spread}{'' if row['converged'] else _ENDED}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(_literal, cells)) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def _literal(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
