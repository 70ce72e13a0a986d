"""The tables of a report, for the console, report.md and report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from fewshot.report.labels import headline_shots, ordered_features, side_labels, weights_label
from pretrain.page.text import Table

Report = Mapping[str, Any]

ENDED = "†"  # beside an accuracy of a probe that was not trained to its end
_CURVES = 8  # of the oracle, a column each
_COMPARED = ("a - b", "shots", "points", "95 % over query images", "draws with a ahead")


def score_table(report: Report, probes: Sequence[str]) -> Table:
    """The means with the error of the draws and of the query set, a row for each feature and probe, and chance.

    The first probe of the protocol is not named in its own table.
    """
    named = probes[0] != next(iter(report["protocol"]["probes"]))
    means: dict[tuple[str, str, str], list[str]] = {}
    for row in report["summary"]:
        key = row["weights"], row["features"], row["probe"]
        means.setdefault(key, []).append(f"{mean_text(row)} ({100 * row['query_std_error']:.2f})")
    names = [(*feature, probe) for feature in ordered_features(report) for probe in probes]
    head = ("weights", "features", *(("probe",) if named else ()))
    rows = [[weights_label(report, *key[:2]), *key[1 : len(head)], *means[key]] for key in names]
    errors = " ± draws (query)" if len(report["protocol"]["seeds"]) > 1 else " (query)"
    columns = [shots + errors for shots in _shots(report)]
    return Table([*head, *columns], [*rows, _chance(report, len(head), len(columns))], names=len(head))


def mean_text(row: Mapping[str, Any]) -> str:
    """A row of the summary: the mean in %, and the deviation over the draws where there are several."""
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
    return f"{100 * row['mean']:.2f}{spread}{_mark(row)}"


def ahead_table(report: Report) -> Table | None:
    """How far each network is ahead of its baselines and of chance: first probe, leading feature, mean over the draws.

    ±: the deviation over the draws, each of which both have. None where no network has a leading feature.
    """
    protocol = report["protocol"]
    found: dict[tuple[str, str, int], list[float]] = {}
    probe = next(iter(protocol["probes"]))
    for row in report["results"]:
        if row["probe"] == probe:
            found.setdefault((row["weights"], row["features"], row["shots"]), []).append(row["accuracy"])
    rows = []
    for one in report["weights"]:
        if (one["id"], one["headline"]) not in ordered_features(report):
            continue
        for baseline, owner in [*one["baselines"].items(), ("chance", None)]:
            cells = []
            for shots in protocol["shots"]:
                scores = found[one["id"], one["headline"], shots]
                others = found[owner, baseline, shots] if owner is not None else [protocol["chance"]] * len(scores)
                points = [100 * (score - other) for score, other in zip(scores, others, strict=True)]
                cells.append(f"{fmean(points):+.2f}" + (f" ± {stdev(points):.2f}" if len(points) > 1 else ""))
            rows.append([one["id"], f"{one['headline']} - {baseline}", *cells])
    errors = " ± draws" if len(protocol["seeds"]) > 1 else ""
    head = ["weights", "difference", *(shots + errors for shots in _shots(report))]
    return Table(head, rows, names=2) if rows else None


def draws_table(report: Report) -> Table:
    """The accuracy of every draw, a column for each seed, then the error of the draws and of the query set."""
    protocol = report["protocol"]
    found: dict[tuple[str, str, str, int], list[str]] = {}
    for row in report["results"]:
        key = row["weights"], row["features"], row["probe"], row["shots"]
        found.setdefault(key, []).append(f"{100 * row['accuracy']:.2f}{_mark(row)}")
    errors = {
        (row["weights"], row["features"], row["probe"], row["shots"]): [
            "–" if row["std"] is None else f"{100 * row['std']:.2f}",
            f"{100 * row['query_std_error']:.2f}",
        ]
        for row in report["summary"]
    }
    keys = [
        (id, feature, probe, k)
        for id, feature in ordered_features(report)
        for probe in protocol["probes"]
        for k in protocol["shots"]
    ]
    rows = [[weights_label(report, *key[:2]), *map(str, key[1:]), *found[key], *errors[key]] for key in keys]
    seeds = [f"seed {seed}" for seed in protocol["seeds"]]
    chance = [*_chance(report, 4, len(seeds)), "–", "–"]
    head = ["weights", "features", "probe", "shots", *seeds, "± draws", "± query"]
    return Table(head, [*rows, chance], names=3)


def _chance(report: Report, names: int, columns: int) -> list[str]:
    return ["chance", *[""] * (names - 1), *[f"{100 * report['protocol']['chance']:.2f}"] * columns]


def comparison_table(report: Report) -> Table | None:
    """Every comparison, with the points of each draw; None where nothing stands beside the reference."""
    rows = report["comparisons"]["rows"]
    if not rows:
        return None
    cells = [[*_compared(report, row), *(f"{100 * points:+.2f}" for points in row["draws"])] for row in rows]
    return Table([*_COMPARED, *(f"seed {seed}" for seed in report["protocol"]["seeds"])], cells)


def short_comparison_table(report: Report) -> Table | None:
    """The comparisons at the shots of the headline."""
    rows = [row for row in report["comparisons"]["rows"] if row["shots"] == headline_shots(report)]
    return Table(_COMPARED, [_compared(report, row) for row in rows]) if rows else None


def _compared(report: Report, row: Mapping[str, Any]) -> list[str]:
    """The cells of _COMPARED."""
    low, difference, high = (f"{100 * row[key]:+.2f}" for key in ("low", "difference", "high"))
    ahead = sum(points > 0 for points in row["draws"])
    return [
        " - ".join(side_labels(report, row)),
        f"{row['shots']}-shot",
        f"{difference}{_mark(row)}",
        f"{low} … {high}",
        f"{ahead} of {len(row['draws'])}",
    ]


def oracle_table(report: Report) -> Table:
    """Mean over seeds for every λ, a column for each curve; of many curves a row for each: at the ends, and best.

    report.json holds them all.
    """
    groups: dict[tuple[str, str, int], list[Sequence[float]]] = {}
    for curve in report["oracle"]["curves"]:
        groups.setdefault((curve["weights"], curve["features"], curve["shots"]), []).append(curve["accuracy"])
    strengths = report["oracle"]["curves"][0]["l2"]
    means = {key: [100 * fmean(values) for values in zip(*seeds, strict=True)] for key, seeds in groups.items()}
    powers = [f"2^{math.log2(l2):g}" for l2 in strengths]
    if len(means) <= _CURVES:
        return Table(
            ["λ", *(f"{id} {feature} {k}-shot" for id, feature, k in means)],
            [[power, *(f"{mean[at]:.2f}" for mean in means.values())] for at, power in enumerate(powers)],
        )
    rows = []
    for (id, feature, k), mean in means.items():
        ends, best = (mean[0], mean[-1]), max(mean)
        rows.append([id, feature, str(k), f"{ends[0]:.2f}", f"{ends[1]:.2f}", f"{best:.2f}", powers[mean.index(best)]])
    return Table(
        ["weights", "features", "shots", f"λ = {powers[0]}", f"λ = {powers[-1]}", "best", "at λ"], rows, names=2
    )


def weights_table(report: Report) -> Table:
    """What was scored: paths, steps and hashes."""
    return Table(
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


def support_table(report: Report) -> Table:
    """The hash of each draw's ids."""
    protocol = report["protocol"]
    return Table(
        ["shots", "seed", "images", "sha256"],
        [[str(row[key]) for key in ("shots", "seed", "images", "sha256")] for row in protocol["support_ids"]],
    )


def _shots(report: Report) -> list[str]:
    return [f"{k}-shot" for k in report["protocol"]["shots"]]


def _mark(row: Mapping[str, Any]) -> str:
    return "" if row["converged"] else ENDED
