"""report.html: a report as a page, with a close look at one of its probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fewshot.closeup import Closeup
from fewshot.report import charts, pictures, statements, tables
from fewshot.report.labels import headline_shots, weights_label
from pretrain.console import isolated
from pretrain.page.bars import MOST, bar_chart
from pretrain.page.confusion import HEIGHT, class_tables, draw_confusions, mistakes_table
from pretrain.page.figure import FILL, mark, set_frame
from pretrain.page.page import Chart, Page
from pretrain.page.text import Table, sentence

Report = Mapping[str, Any]

_HEADLINES = 4  # networks on cards; the table has them all
_ROWS = 400  # of a table; report.json holds them all


def html(report: Report, closeup: Closeup) -> str:
    """The content of report.html."""
    probe, *others = report["protocol"]["probes"]
    page = Page(f"Few-shot: {report['name']}")
    page.cards(_cards(report, closeup.row.weights))
    page.notes(statements.warnings(report), warning=True)
    page.heading("Accuracy")
    page.notes([f"{statements.caption(report, probe)}."])
    page.table(_cut(page, tables.score_table(report, [probe])))
    page.notes(map(sentence, statements.reading(report, [probe])))
    found = [make(report) for make in (charts.shots_chart, charts.steps_chart)]
    page.grid([chart for chart in found if chart])
    page.grid([charts.probes_chart(report), charts.features_chart(report)])
    if ahead := tables.ahead_table(report):
        page.heading("Ahead of the baselines")
        page.notes([f"{probe}, in percentage points."])
        page.table(_cut(page, ahead))
    if others:
        page.heading("Other probes")
        page.table(_cut(page, tables.score_table(report, others)))
    if compared := tables.comparison_table(report):
        page.heading("Comparisons")
        page.notes(["In percentage points.", sentence(report["comparisons"]["method"])])
        page.grid([chart for chart in [charts.comparisons_chart(report)] if chart])
        page.table(_cut(page, compared))
    _look_closely(page, closeup)
    if report["oracle"]["curves"]:
        page.heading("Every λ: an oracle")
        page.notes([sentence(report["oracle"]["note"])], warning=True)
        page.grid([charts.oracle_chart(report)])
    page.heading("Every draw")
    page.notes(["Accuracy in %."])
    page.table(_cut(page, tables.draws_table(report)))
    _add_reproduction(page, report)
    return page.html()


def _cards(report: Report, first: str) -> dict[str, str]:
    """The headlines of networks, that of weights `first` before the others, and what they are to be held against."""
    protocol, at = report["protocol"], headline_shots(report)
    probe = next(iter(protocol["probes"]))
    headlines = {one["id"]: one["headline"] for one in report["weights"]}
    rows = [
        row
        for row in report["summary"]
        if (row["probe"], row["shots"]) == (probe, at) and headlines.get(row["weights"]) == row["features"]
    ]
    rows.sort(key=lambda row: row["weights"] != first)
    cards = {}
    for row in rows[:_HEADLINES]:
        named = f"{row['weights']}: " if len(rows) > 1 else ""
        spread = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
        cards[f"{named}{at}-shot {probe}, {row['features']}"] = f"{100 * row['mean']:.2f}{spread} %"
    if rows:
        cards["query set's error, points"] = f"± {max(100 * row['query_std_error'] for row in rows):.2f}"
    images = protocol["images"]
    baselines: Mapping[str, str] = next((one["baselines"] for one in report["weights"] if one["id"] == first), {})
    for row in report["summary"]:
        if (row["probe"], row["shots"]) == (probe, at) and baselines.get(row["features"]) == row["weights"]:
            named = f"{weights_label(report, row['weights'], row['features'])}: " if len(rows) > 1 else ""
            cards[f"{named}baseline {row['features']}"] = f"{100 * row['mean']:.2f} %"
    cards["chance"] = f"{100 * protocol['chance']:.2f} %"
    cards["classes"] = f"{images['support']['classes']:,}"
    cards["query images"] = f"{images['query']['images']:,}"
    cards["draws"] = f"{len(protocol['seeds']):,}"
    return cards


def _cut(page: Page, table: Table) -> Table:
    """The first rows of a table; of what is left out the page says so."""
    if len(table.rows) > _ROWS:
        page.notes([f"The first {_ROWS:,} of {len(table.rows):,} rows; report.json holds them all."])
    return Table(table.header, table.rows[:_ROWS], table.caption, table.names)


# A close look at one probe


def _look_closely(page: Page, closeup: Closeup) -> None:
    row = closeup.row
    page.heading(f"{row.shots}-shot {row.probe} on {row.features}, image by image")
    page.notes(
        [
            f"{isolated(row.weights)}, the draw of seed {row.seed}: {100 * row.accuracy:.2f} % of "
            f"{len(closeup.labels):,} query images."
        ]
    )
    confusions = closeup.confusions
    wrong = int((closeup.predicted != closeup.labels).sum())
    page.grid(
        [
            _classes_chart(closeup),
            Chart(
                f"Confusions: {wrong:,} of {len(closeup.labels):,} query images are taken for another class; "
                "the pairs stand in the table of mistakes.",
                lambda figure: draw_confusions(figure, confusions, closeup.name, "query images"),
                HEIGHT,
            ),
        ]
    )
    mistakes = mistakes_table(confusions.commonest(len(confusions.counts)), closeup.name, "Most frequent mistakes")
    page.grid([[one] for one in [*_classes(closeup), mistakes] if one.rows])
    fault = pictures.fault(closeup)
    if fault:
        page.notes([sentence(fault)], warning=True)
    else:
        page.heading(f"Support images: {row.shots} of each class, seed {row.seed}")
        groups = pictures.support_groups(closeup)
        classes = len(closeup.draw.ids) // row.shots
        part = f" Shown are {len(groups)} of {classes:,} classes, spread evenly." if len(groups) < classes else ""
        page.notes([f"What the probe has learned from, with ids (shards.py locate INDEX ID finds them).{part}"])
        page.groups(groups)
    page.heading("Nearest neighbours")
    page.notes([f"Some query images, and the support images nearest to each by cosine in {row.features}."])
    if fault:
        page.table(_neighbours(closeup))
    else:
        page.groups(pictures.neighbour_groups(closeup))
    page.heading("Worst mistakes")
    page.notes(
        [
            "The query images whose predicted class has a score furthest above that of their label; beside each the "
            "nearest support image of the class that it was taken for."
            if closeup.mistakes
            else "None: every query image is predicted as labelled."
        ]
    )
    if fault:
        page.table(_mistakes(closeup))
    else:
        page.groups(pictures.mistake_groups(closeup))


def _accuracies(closeup: Closeup) -> dict[int, float]:
    """By class that any query image has, ascending."""
    classes = np.unique(closeup.labels)
    right = closeup.predicted == closeup.labels
    counts = np.bincount(closeup.labels)
    return {int(label): int(right[closeup.labels == label].sum()) / int(counts[label]) for label in classes}


def _classes_chart(closeup: Closeup) -> Chart:
    """A bar for each class; of many, a curve."""
    found = _accuracies(closeup)
    ordered = sorted(found.values())
    text = (
        f"Accuracy by class, {len(found):,} classes: {100 * ordered[0]:.1f} to {100 * ordered[-1]:.1f} %, "
        f"median {100 * float(np.median(ordered)):.1f} %"
    )
    if len(found) <= MOST:
        values = [100 * value for value in found.values()]
        return bar_chart(text, [closeup.name(label) for label in found], values, [f"{value:.1f}" for value in values])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        set_frame(axes, text)
        axes.fill_between(range(1, len(ordered) + 1), [100 * value for value in ordered], step="mid", color=FILL)
        axes.set(xlim=(0.5, len(ordered) + 0.5), ylim=(0, 100), xlabel="classes, from the lowest", ylabel="accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        mark(axes, (len(ordered) + 1) / 2)

    return Chart(f"{text}.", draw)


def _classes(closeup: Closeup) -> list[Table]:
    """All classes, or those at both ends by accuracy."""
    accuracies = _accuracies(closeup)
    images, predicted = (np.bincount(of, minlength=max(accuracies) + 1) for of in (closeup.labels, closeup.predicted))

    def cells(label: int) -> Sequence[str]:
        right = round(accuracies[label] * images[label])
        precision = f"{100 * right / predicted[label]:.2f}" if predicted[label] else "–"
        figures = f"{images[label]:,}", f"{100 * accuracies[label]:.2f}", f"{predicted[label]:,}", precision
        return closeup.name(label), *figures

    header = ["class", "images", "accuracy", "predicted", "precision"]
    return class_tables(list(accuracies), accuracies.__getitem__, header, cells)


def _neighbours(closeup: Closeup) -> Table:
    """The nearest support images, where there are no pictures of them."""
    labels, ids = closeup.draw.labels, closeup.draw.ids
    rows = [
        [
            f"{closeup.query_ids[near.row]}",
            closeup.name(int(closeup.labels[near.row])),
            f"{ids[place]}",
            closeup.name(int(labels[place])),
            f"{cosine:.3f}",
        ]
        for near in closeup.neighbours
        for place, cosine in zip(near.places, near.cosines, strict=True)
    ]
    return Table(["query id", "label", "support id", "class", "cosine"], rows, names=4)


def _mistakes(closeup: Closeup) -> Table:
    """The worst mistakes, where there are no pictures of them."""
    rows = [
        [
            f"{closeup.query_ids[one.near.row]}",
            closeup.name(int(closeup.labels[one.near.row])),
            closeup.name(int(closeup.predicted[one.near.row])),
            f"{one.margin:.3g}",
        ]
        for one in closeup.mistakes
    ]
    return Table(["query id", "label", "taken for", "ahead by"], rows, names=3)


def _add_reproduction(page: Page, report: Report) -> None:
    page.heading("To get this again")
    page.facts(statements.protocol_facts(report))
    page.table(_cut(page, tables.weights_table(report)))
    page.notes([f"sha256 of the support ids ({report['protocol']['support_ids_hashed']}):"])
    page.table(_cut(page, tables.support_table(report)))
    page.heading("This run")
    facts = statements.run_facts(report)
    if command := facts.pop("command", ""):
        page.command(command)
    page.notes(["Another number of ranks or threads gives the same page, but for what follows."])
    page.facts(facts)
