"""A report as text: the console's table and report.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fewshot.probes.table import PROBES, SWEPT
from fewshot.report.labels import headline_shots, ordered_features, weights_label
from pretrain.console import printable
from pretrain.page.text import Table, markdown_text, sentence

_COMPARED = ("a - b", "shots", "points", "95 % over query images", "draws with a ahead")
_FEW = 6  # comparisons on the console
_ENDED = "†"  # beside an accuracy of a probe that was not trained to its end


def table(report: Mapping[str, Any]) -> str:
    """The console's table: the first probe's accuracy by feature and shots; after it what limits its meaning."""
    probe = next(iter(report["protocol"]["probes"]))
    lines = [_caption(report, probe), *_scores(report, [probe]).text()]
    paths = [(one["id"], str(one["checkpoint"])) for one in report["weights"] if "checkpoint" in one]
    lines += [f"{printable(id)}: {printable(path)}" for id, path in paths]
    lines += [*_reading(report, [probe]), *_warnings(report)]
    if compared := _shortly_compared(report):
        lines += ["", *compared]
    return "\n".join(lines)


def markdown(report: Mapping[str, Any], charts: Sequence[str] = ()) -> str:
    """The content of report.md."""
    protocol = report["protocol"]
    probe, *others = protocol["probes"]
    lines = [f"# Few-shot: {markdown_text(report['name'])}", "", *_headline(report, probe), ""]
    lines += [*map(markdown_text, _warnings(report)), "", f"## {_caption(report, probe)}", ""]
    lines += [*_scores(report, [probe]).markdown(), "", *(f"- {line}" for line in _reading(report, [probe]))]
    lines += [f"\n![{chart}]({chart})" for chart in charts if chart != "oracle.png"]
    lines += _comparisons(report)
    if others:
        lines += ["", "## Other probes", "", *_scores(report, others).markdown()]
        lines += ["", *(f"- {line}" for line in _reading(report, others))]
    lines += ["", "## Every seed", "", "Accuracy in %.", "", *_seeds(report).markdown()]
    lines += _oracle(report, "oracle.png" in charts)
    return "\n".join([*lines, *_reproduction(report), *_run(report)]) + "\n"


def _scores(report: Mapping[str, Any], probes: Sequence[str]) -> Table:
    """The means, a row for each feature and probe; the first probe of the protocol is not named in its own table."""
    named = probes[0] != next(iter(report["protocol"]["probes"]))
    means: dict[tuple[str, str, str], list[str]] = {}
    for row in report["summary"]:
        spread = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
        key = row["weights"], row["features"], row["probe"]
        means.setdefault(key, []).append(f"{100 * row['mean']:.2f}{spread}{_mark(row)}")
    names = [(*feature, probe) for feature in ordered_features(report) for probe in probes]
    head = ("weights", "features", *(("probe",) if named else ()))
    rows = [[weights_label(report, *key[:2]), *key[1 : len(head)], *means[key]] for key in names]
    return Table([*head, *_shots(report)], rows, names=len(head))


def _seeds(report: Mapping[str, Any]) -> Table:
    """The accuracy of every draw, a column for each seed."""
    protocol = report["protocol"]
    found: dict[tuple[str, str, str, int], list[str]] = {}
    for row in report["results"]:
        key = row["weights"], row["features"], row["probe"], row["shots"]
        found.setdefault(key, []).append(f"{100 * row['accuracy']:.2f}{_mark(row)}")
    keys = [
        (id, feature, probe, k)
        for id, feature in ordered_features(report)
        for probe in protocol["probes"]
        for k in protocol["shots"]
    ]
    rows = [[weights_label(report, *key[:2]), *map(str, key[1:]), *found[key]] for key in keys]
    return Table(["weights", "features", "probe", "shots", *(f"seed {seed}" for seed in protocol["seeds"])], rows)


def _shots(report: Mapping[str, Any]) -> list[str]:
    return [f"{k}-shot" for k in report["protocol"]["shots"]]


def _mark(row: Mapping[str, Any]) -> str:
    return "" if row["converged"] else _ENDED


def _headline(report: Mapping[str, Any], probe: str) -> list[str]:
    """One sentence for each WEIGHTS: the score at 5 shots, or at the most shots there are."""
    shots = report["protocol"]["shots"]
    at = shots.index(headline_shots(report))
    scores = {(row[0], row[1]): row[2 + at] for row in _scores(report, [probe]).rows}
    return [
        f"- **{markdown_text(one['id'])}: {scores[one['id'], one['headline']]} % at {shots[at]} shots** ({probe}, "
        f"features `{one['headline']}`)."
        for one in report["weights"]
        if (one["id"], one["headline"]) in scores
    ]


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


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """What limits the meaning of the scores, a sentence each."""
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
    trained_on = {
        images["query"].get("index_sha256"): "",
        images["query"].get("sequence_sha256"): ", by keys, labels and sizes",
    }
    lines += [
        f"{one['id']} was trained on the images of the query set{trained_on[one['trained_on']]}."
        for one in report["weights"]
        if one.get("trained_on") and one["trained_on"] in trained_on
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


def _comparisons(report: Mapping[str, Any]) -> list[str]:
    """The section of report.md; nothing where nothing stands beside the reference."""
    rows = report["comparisons"]["rows"]
    if not rows:
        return []
    method = sentence(report["comparisons"]["method"])
    lines = ["", "## Comparisons", "", f"In percentage points. {method}", ""]
    cells = [[*_compared(row), *(f"{100 * points:+.2f}" for points in row["draws"])] for row in rows]
    return lines + Table([*_COMPARED, *(f"seed {seed}" for seed in report["protocol"]["seeds"])], cells).markdown()


def _shortly_compared(report: Mapping[str, Any]) -> list[str]:
    """The console's lines: the first comparisons, at the shots of the headline."""
    rows = [row for row in report["comparisons"]["rows"] if row["shots"] == headline_shots(report)]
    if not rows:
        return []
    lines = Table(_COMPARED, [_compared(row) for row in rows[:_FEW]]).text()
    return [*lines, f"… {len(rows) - _FEW} more in report.md"] if len(rows) > _FEW else lines


def _compared(row: Mapping[str, Any]) -> list[str]:
    """The cells of _COMPARED."""
    a, b = row["a"], row["b"]
    named = [key for key in a if a[key] != b[key]]
    sides = " - ".join(" ".join(side[key] for key in named) for side in (a, b))
    low, difference, high = (f"{100 * row[key]:+.2f}" for key in ("low", "difference", "high"))
    ahead = sum(points > 0 for points in row["draws"])
    return [
        sides,
        f"{row['shots']}-shot",
        f"{difference}{_mark(row)}",
        f"{low} … {high}",
        f"{ahead} of {len(row['draws'])}",
    ]


def _oracle(report: Mapping[str, Any], chart: bool) -> list[str]:
    curves = report["oracle"]["curves"]
    if not curves:
        return []
    note = report["oracle"]["note"].capitalize()
    lines = ["", f"## The {SWEPT.name} for every λ", "", f"{note}. Accuracy in %, mean over seeds.", ""]
    groups: dict[tuple[str, str, int], list[Sequence[float]]] = {}
    for curve in curves:
        groups.setdefault((curve["weights"], curve["features"], curve["shots"]), []).append(curve["accuracy"])
    lines += Table(
        ["λ", *(f"{id} {feature} {k}-shot" for id, feature, k in groups)],
        [
            [
                f"2^{math.log2(l2):g}",
                *(f"{100 * fmean(seed[at] for seed in seeds):.2f}" for seeds in groups.values()),
            ]
            for at, l2 in enumerate(curves[0]["l2"])
        ],
    ).markdown()
    return [*lines, "\n![oracle.png](oracle.png)"] if chart else lines


def _reproduction(report: Mapping[str, Any]) -> list[str]:
    protocol = report["protocol"]
    lines = ["", "## To get this again", ""]
    lines += Table(
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
    ).markdown()
    lines += [""]
    for split in ("support", "query"):
        found = protocol["images"][split]
        lines.append(
            f"- {split}: " + ", ".join(f"{key} {markdown_text(_plain(value))}" for key, value in found.items())
        )
    lines += [
        f"- draw: {protocol['draw']}",
        f"- standardised: {protocol['standardised']}",
        f"- λ = {protocol['l2']:g}, not scaled by the number of images",
        *(f"- {name}: {markdown_text(text)}" for name, text in protocol["probes"].items()),
        *(f"- features `{name}`: {text}" for name, text in protocol["features"].items()),
        f"- arithmetic: {protocol['arithmetic']}",
        "- versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        f"- commit: {report['git_commit'] or 'unknown'}",
        "",
        f"sha256 of the support ids ({protocol['support_ids_hashed']}):",
        "",
    ]
    lines += Table(
        ["shots", "seed", "images", "sha256"],
        [[str(row[key]) for key in ("shots", "seed", "images", "sha256")] for row in protocol["support_ids"]],
    ).markdown()
    return lines


def _run(report: Mapping[str, Any]) -> list[str]:
    """The last section: all that differs where the same numbers come out."""
    run = {key: value for key, value in report["run"].items() if key not in ("config", "seconds")}
    return [
        "",
        "## This run",
        "",
        *(f"- {key}: {markdown_text(str(value))}" for key, value in run.items()),
        "- wall time: " + ", ".join(f"{part} {taken:.1f} s" for part, taken in report["run"]["seconds"].items()),
    ]


def _caption(report: Mapping[str, Any], probe: str) -> str:
    protocol = report["protocol"]
    chosen = ", λ chosen on the support set" if PROBES[probe].chosen else ""
    strength = chosen or (f", λ = {protocol['l2']:g}" if PROBES[probe].configured else "")
    seeds = protocol["seeds"]
    spread = f"mean ± std over seeds {' '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    images = protocol["images"]["query"]["images"]
    kinds = sorted({one["dtype"] for one in report["weights"]} & {"bfloat16", "float16"})
    arithmetic = f", features in {' and '.join(kinds)}" if kinds else ""
    return f"Accuracy in % on {images:,} query images: {probe}{strength}, {spread}{arithmetic}"


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
