"""A report in sentences: what its numbers mean, what limits them, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewshot.probes.table import PROBES
from fewshot.report.tables import ENDED

Report = Mapping[str, Any]


def caption(report: Report, probe: str) -> str:
    protocol = report["protocol"]
    chosen = ", λ chosen on the support set" if PROBES[probe].chosen else ""
    strength = chosen or (f", λ = {protocol['l2']:g}" if PROBES[probe].configured else "")
    seeds = protocol["seeds"]
    spread = f"mean ± std over seeds {' '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    images = protocol["images"]["query"]["images"]
    kinds = sorted({one["dtype"] for one in report["weights"]} & {"bfloat16", "float16"})
    arithmetic = f", features in {' and '.join(kinds)}" if kinds else ""
    return f"Accuracy in % on {images:,} query images: {probe}{strength}, {spread}{arithmetic}"


def reading(report: Report, probes: Sequence[str]) -> list[str]:
    """What the numbers of a table of `probes` mean, a line each."""
    protocol, rows = report["protocol"], [row for row in report["summary"] if row["probe"] in probes]
    seeds, query = protocol["seeds"], protocol["images"]["query"]
    low, high = (f"{100 * pick(row['query_std_error'] for row in rows):.2f}" for pick in (min, max))
    return [
        f"±: standard deviation (ddof 1) over the draws of support images of seeds {' '.join(map(str, seeds))}, all "
        f"scored on the same {query['images']:,} query images"
        if len(seeds) > 1
        else f"one draw of support images, of seed {seeds[0]}: how much another would differ is not known",
        "in brackets the query images' own noise, which no draw tells: binomial standard error sqrt(p(1-p)/"
        f"{query['images']}), here {low if low == high else f'{low} to {high}'} points",
        f"chance: {100 * protocol['chance']:.2f}; the commonest class is {100 * query['commonest_class']:.2f} % of the "
        "query images",
    ]


def warnings(report: Report) -> list[str]:
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
            f"accuracies ({ENDED}) are not the probe's."
        )
    return lines


def protocol_facts(report: Report) -> dict[str, str]:
    """How the scores came about, by name."""
    protocol = report["protocol"]
    return {
        **{
            split: ", ".join(f"{key} {_plain(value)}" for key, value in protocol["images"][split].items())
            for split in ("support", "query")
        },
        "draw": protocol["draw"],
        "standardised": protocol["standardised"],
        "λ": f"{protocol['l2']:g}, not scaled by the number of images",
        **protocol["probes"],
        **{f"features {name}": text for name, text in protocol["features"].items()},
        "arithmetic": protocol["arithmetic"],
        "versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "commit": report["git_commit"] or "unknown",
    }


def run_facts(report: Report) -> dict[str, str]:
    """All that differs where the same numbers come out, by name."""
    run = report["run"]
    return {
        **{key: str(value) for key, value in run.items() if key not in ("config", "seconds")},
        "wall time": ", ".join(f"{part} {taken:.1f} s" for part, taken in run["seconds"].items()),
    }


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
