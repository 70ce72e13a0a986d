"""A report as people read it: the console's table, report.md and its charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewshot.features import LAYERS
from fewshot.probes import PROBES, SWEPT
from pretrain.console import printable
from pretrain.page.figure import encode_figure, name_style
from pretrain.page.text import Table, markdown_text, shortened

Lines = list[tuple[Any, str]]  # what is drawn, and its label

_ENDED = "†"  # beside an accuracy of a probe that was not trained to its end
_BASELINE_DASHES = {"pixels": ":", "untrained": "--"}


def leading_probe(report: Mapping[str, Any]) -> str:
    """The first that the protocol names."""
    return next(iter(report["protocol"]["probes"]))


def table(report: Mapping[str, Any]) -> str:
    """The headline for a console: accuracy by feature and shots, a line each; after it what is amiss."""
    probe, shots = leading_probe(report), report["protocol"]["shots"]
    rows = [(id, feature, *(_cell(report, id, probe, feature, k) for k in shots)) for id, feature in _features(report)]
    scores = Table(("weights", "features", *(f"{k}-shot" for k in shots)), rows, names=2)
    lines = [_caption(report, probe), *scores.text()]
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
        f"# Few-shot: {markdown_text(report['name'])}",
        "",
        *_headline(report, probe),
        "",
        *map(markdown_text, _amiss(report)),
        "",
    ]
    lines += [f"## {_caption(report, probe)}", ""]
    lines += _markdown_table(
        ["weights", "features", *many],
        [[id, f, *(_cell(report, id, probe, f, k) for k in shots)] for id, f in _features(report)],
    )
    lines += ["", *(f"- {line}" for line in _reading(report, [probe]))]
    if differences := _differences(report, probe):
        lines += ["", "Ahead of the baselines, in percentage points of the mean:", ""]
        lines += _markdown_table(["weights", "difference", *many], differences)
    lines += [f"\n![{chart}]({chart})" for chart in charts if chart != "oracle.png"]

    others = [name for name in protocol["probes"] if name != probe]
    if others:
        lines += ["", "## Other probes", ""]
        lines += _markdown_table(
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
    lines += _markdown_table(
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
            lines.append(f"- **{markdown_text(one['id'])}: {score} % at {k} shots** ({probe}, features `{feature}`).")
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
        for baseline in (name for name, layer in LAYERS.items() if layer.baseline):
            if {(id, leading), (id, baseline)} <= present:
                ahead = [means[id, leading, k] - means[id, baseline, k] for k in report["protocol"]["shots"]]
                rows.append([id, f"{leading} - {baseline}", *(f"{points:+.2f}" for points in ahead)])
    return rows


def _oracle(report: Mapping[str, Any], chart: bool) -> list[str]:
    curves = report["oracle"]["curves"]
    if not curves:
        return []
    note = report["oracle"]["note"].capitalize()
    lines = ["", f"## The {SWEPT.name} for every λ", "", f"{note}. Accuracy in %, mean over seeds.", ""]
    groups: dict[tuple[str, str, int], list[Sequence[float]]] = {}
    for curve in curves:
        groups.setdefault((curve["weights"], curve["features"], curve["shots"]), []).append(curve["accuracy"])
    lines += _markdown_table(
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
    lines += _markdown_table(
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
        *(f"- {key}: {markdown_text(_plain(value))}" for key, value in run.items() if key != "config"),
        "- wall time: " + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in report["seconds"].items()),
        "- versions: " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        f"- commit: {report['git_commit'] or 'unknown'}",
        "",
        f"sha256 of the support ids ({protocol['support_ids_hashed']}):",
        "",
    ]
    lines += _markdown_table(
        ["shots", "seed", "images", "sha256"],
        [[str(row[key]) for key in ("shots", "seed", "images", "sha256")] for row in protocol["support_ids"]],
    )
    return lines


def _caption(report: Mapping[str, Any], probe: str) -> str:
    protocol = report["protocol"]
    strength = f", λ = {protocol['l2']:g}" if PROBES[probe].configured else ""
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


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return Table(header, rows).markdown()


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def draw_charts(report: Mapping[str, Any]) -> dict[str, bytes]:
    """The PNGs by name: accuracy.png, and oracle.png where there is a sweep."""
    draws: dict[str, Callable[[Axes, Mapping[str, Any]], tuple[str, Lines]]] = {"accuracy.png": _draw_accuracy}
    if report["oracle"]["curves"]:
        draws["oracle.png"] = _draw_oracle
    charts = {}
    for name, draw in draws.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        title, lines = draw(axes, report)
        axes.set_ylabel("accuracy on the query set, %")
        axes.grid(alpha=0.3)
        axes.set_title(shortened(f"{report['name']}: {title}", 100), fontsize=10, **name_style())
        legend = figure.legend([line for line, _ in lines], map(str, range(len(lines))), loc="outside right upper")
        for text, (_, label) in zip(legend.get_texts(), lines, strict=True):
            # Set afterwards: matplotlib leaves out labels that begin with "_".
            text.set(text=shortened(label, 60), fontsize=8, **name_style())
        charts[name] = encode_figure(figure, dpi=140)
    return charts


def _draw_accuracy(axes: Axes, report: Mapping[str, Any]) -> tuple[str, Lines]:
    """The first probe: mean and standard deviation against shots, a line for each feature; its title."""
    probe, shots = leading_probe(report), report["protocol"]["shots"]
    colours = _colours()
    drawn: Lines = []
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in report["summary"]:
        if row["probe"] == probe:
            groups.setdefault((row["weights"], row["features"]), []).append(row)
    several = len(report["weights"]) > 1
    for (id, feature), rows in groups.items():
        line = axes.errorbar(
            [row["shots"] for row in rows],
            [100 * row["mean"] for row in rows],
            yerr=[100 * (row["std"] or 0) for row in rows],
            color="0.45" if feature in LAYERS and LAYERS[feature].baseline else next(colours),
            linestyle=_BASELINE_DASHES.get(feature, "-"),
            marker="o",
            markersize=4,
            capsize=3,
        )
        drawn.append((line, f"{id} {feature}" if several else feature))
    drawn.append((axes.axhline(100 * report["protocol"]["chance"], color="0.7", linewidth=0.8), "chance"))
    axes.set_xscale("log")
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.minorticks_off()
    axes.set_xlabel("labelled images of each class")
    return f"{probe} on frozen features, mean ± std over the draws", drawn


def _draw_oracle(axes: Axes, report: Mapping[str, Any]) -> tuple[str, Lines]:
    """Mean over seeds against λ, a line for each number of shots; its title."""
    colours = _colours()
    drawn: Lines = []
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for curve in report["oracle"]["curves"]:
        groups.setdefault((curve["weights"], curve["features"], curve["shots"]), []).append(curve)
    for (id, feature, shots), curves in groups.items():
        seeds = zip(*(curve["accuracy"] for curve in curves), strict=True)
        mean = [100 * sum(values) / len(curves) for values in seeds]
        [line] = axes.plot(curves[0]["l2"], mean, color=next(colours))
        drawn.append((line, f"{id} {feature} {shots}-shot"))
    l2 = report["protocol"]["l2"]
    drawn.append((axes.axvline(l2, color="0.45", linestyle=":"), f"λ = {l2:g}"))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("λ")
    return "oracle on the query set, not a result", drawn


def _colours() -> Iterator[str]:
    return cycle(f"C{number}" for number in range(10))
