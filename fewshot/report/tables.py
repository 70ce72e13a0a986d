"""The tables of a report, for the console, report.md and report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fewshot.report.labels import headline_shots, ordered_features, weights_label
from pretrain.page.text import Table

Report = Mapping[str, Any]

ENDED = "†"  # beside an accuracy of a probe that was not trained to its end
_COMPARED = ("a - b", "shots", "points", "95 % over query images", "draws with a ahead")


def score_table(report: Report, probes: Sequence[str]) -> Table:
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


def draws_table(report: Report) -> Table:
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


def comparison_table(report: Report) -> Table | None:
    """Every comparison, with the points of each draw; None where nothing stands beside the reference."""
    rows = report["comparisons"]["rows"]
    if not rows:
        return None
    cells = [[*_compared(row), *(f"{100 * points:+.2f}" for points in row["draws"])] for row in rows]
    return Table([*_COMPARED, *(f"seed {seed}" for seed in report["protocol"]["seeds"])], cells)


def short_comparison_table(report: Report) -> Table | None:
    """The comparisons at the shots of the headline."""
    rows = [row for row in report["comparisons"]["rows"] if row["shots"] == headline_shots(report)]
    return Table(_COMPARED, [_compared(row) for row in rows]) if rows else None


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


def oracle_table(report: Report) -> Table:
    """Mean over seeds for every λ, a column for each curve."""
    curves = report["oracle"]["curves"]
    groups: dict[tuple[str, str, int], list[Sequence[float]]] = {}
    for curve in curves:
        groups.setdefault((curve["weights"], curve["features"], curve["shots"]), []).append(curve["accuracy"])
    return Table(
        ["λ", *(f"{id} {feature} {k}-shot" for id, feature, k in groups)],
        [
            [
                f"2^{math.log2(l2):g}",
                *(f"{100 * fmean(seed[at] for seed in seeds):.2f}" for seeds in groups.values()),
            ]
            for at, l2 in enumerate(curves[0]["l2"])
        ],
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
