"""A report as text: the console's table and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewshot.probes.table import SWEPT
from fewshot.report.labels import headline_shots
from fewshot.report.statements import caption, protocol_facts, reading, run_facts, warnings
from fewshot.report.tables import (
    ahead_table,
    comparison_table,
    draws_table,
    mean_text,
    oracle_table,
    score_table,
    short_comparison_table,
    support_table,
    weights_table,
)
from pretrain.console import isolated
from pretrain.page.text import Table, markdown_text, sentence

Report = Mapping[str, Any]

_FEW = 6  # comparisons on the console


def table(report: Report) -> str:
    """The console's table: the first probe's accuracy by feature and shots; after it what limits its meaning."""
    probe = next(iter(report["protocol"]["probes"]))
    lines = [caption(report, probe), *score_table(report, [probe]).text()]
    paths = [(one["id"], str(one["checkpoint"])) for one in report["weights"] if "checkpoint" in one]
    lines += [f"{isolated(id)}: {isolated(path)}" for id, path in paths]
    lines += [*reading(report, [probe]), *warnings(report)]
    if compared := _shortly_compared(report):
        lines += ["", *compared]
    return "\n".join(lines)


def markdown(report: Report, charts: Sequence[str] = ()) -> str:
    """The content of report.md."""
    protocol = report["protocol"]
    probe, *others = protocol["probes"]
    lines = [f"# Few-shot: {markdown_text(report['name'])}", "", *_headline(report, probe), ""]
    lines += [*map(markdown_text, warnings(report)), "", f"## {caption(report, probe)}", ""]
    lines += [*score_table(report, [probe]).markdown(), "", *(f"- {line}" for line in reading(report, [probe]))]
    lines += [f"\n![{chart}]({chart})" for chart in charts if chart != "oracle.png"]
    if ahead := ahead_table(report):
        lines += ["", f"## Ahead of the baselines: {probe}, in percentage points", "", *ahead.markdown()]
    lines += _comparisons(report)
    if others:
        lines += ["", "## Other probes", "", *score_table(report, others).markdown()]
        lines += ["", *(f"- {line}" for line in reading(report, others))]
    lines += ["", "## Every seed", "", "Accuracy in %.", "", *draws_table(report).markdown()]
    lines += _oracle(report, "oracle.png" in charts)
    lines += ["", "## To get this again", "", *weights_table(report).markdown(), "", *_items(protocol_facts(report))]
    lines += [
        "",
        f"sha256 of the support ids ({protocol['support_ids_hashed']}):",
        "",
        *support_table(report).markdown(),
    ]
    lines += ["", "## This run", "", *_items(run_facts(report))]
    return "\n".join(lines) + "\n"


def _headline(report: Report, probe: str) -> list[str]:
    """One sentence for each WEIGHTS: the score at 5 shots, or at the most shots there are."""
    shots = headline_shots(report)
    scores = {
        (row["weights"], row["features"]): mean_text(row)
        for row in report["summary"]
        if (row["probe"], row["shots"]) == (probe, shots)
    }
    return [
        f"- **{markdown_text(one['id'])}: {scores[one['id'], one['headline']]} % at {shots} shots** ({probe}, "
        f"features `{one['headline']}`)."
        for one in report["weights"]
        if (one["id"], one["headline"]) in scores
    ]


def _comparisons(report: Report) -> list[str]:
    """The section of report.md; nothing where nothing stands beside the reference."""
    found = comparison_table(report)
    if found is None:
        return []
    method = sentence(report["comparisons"]["method"])
    return ["", "## Comparisons", "", f"In percentage points. {method}", "", *found.markdown()]


def _shortly_compared(report: Report) -> list[str]:
    """The console's lines: the first comparisons, at the shots of the headline."""
    found = short_comparison_table(report)
    if found is None:
        return []
    lines = Table(found.header, found.rows[:_FEW]).text()
    return [*lines, f"… {len(found.rows) - _FEW} more in report.md"] if len(found.rows) > _FEW else lines


def _oracle(report: Report, chart: bool) -> list[str]:
    if not report["oracle"]["curves"]:
        return []
    note = report["oracle"]["note"].capitalize()
    lines = ["", f"## The {SWEPT.name} for every λ", "", f"{note}. Accuracy in %, mean over seeds.", ""]
    lines += oracle_table(report).markdown()
    return [*lines, "\n![oracle.png](oracle.png)"] if chart else lines


def _items(facts: Mapping[str, str]) -> list[str]:
    return [f"- {markdown_text(name)}: {markdown_text(text)}" for name, text in facts.items()]
