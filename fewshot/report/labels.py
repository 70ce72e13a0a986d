"""What the rows of a report are called in its tables and charts, and in which order they stand there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ordered_features(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(weights, features) of the rows: as they stand in the report, baselines after the others."""
    found = dict.fromkeys((row["weights"], row["features"]) for row in report["summary"])
    return sorted(found, key=lambda pair: is_baseline(report, *pair))


def is_baseline(report: Mapping[str, Any], id: str, feature: str) -> bool:
    """Whether the rows of `feature` that stand under weights `id` are a baseline's."""
    return any(one["baselines"].get(feature) == id for one in report["weights"])


def weights_label(report: Mapping[str, Any], id: str, feature: str) -> str:
    """The weights that rows are of: their id; of a baseline that several share, how many do."""
    sharing = [one["id"] for one in report["weights"] if one["baselines"].get(feature) == id]
    if len(sharing) < 2:
        return id
    return "all weights" if len(sharing) == len(report["weights"]) else f"{id} and {len(sharing) - 1} more"


def side_labels(report: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, str]:
    """Sides a and b of a comparison, each by what it does not share with the other.

    A baseline that a's weights have too is theirs, under whatever weights its rows stand.
    """
    a, b = row["a"], row["b"]
    own = [one["baselines"].get(b["features"]) for one in report["weights"] if one["id"] == a["weights"]]
    told = [key for key in a if a[key] != b[key] and not (key == "weights" and b["weights"] in own)]
    return " ".join(a[key] for key in told), " ".join(b[key] for key in told)


def headline_shots(report: Mapping[str, Any]) -> int:
    """The shots of the headline: 5, or the most there are."""
    shots: list[int] = report["protocol"]["shots"]
    return 5 if 5 in shots else max(shots)


def newest_steps(report: Mapping[str, Any]) -> set[str]:
    """The ids of the weights, of several steps of a run the newest alone."""
    newest: dict[tuple[str, bool], Mapping[str, Any]] = {}
    for one in report["weights"]:
        first = newest.setdefault((one["run"], one["averaged"]), one)
        if (one["step"] or 0) > (first["step"] or 0):
            newest[one["run"], one["averaged"]] = one
    return {one["id"] for one in newest.values()}
