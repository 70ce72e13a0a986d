"""What a sweep found, for the console and as a plot."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from pretrain.page.figure import FILL, draw_png, mark, set_frame
from pretrain.page.text import Table

Record = dict[str, Any]  # as sweep.json holds it


def sweep_text(record: Record) -> str:
    """Two tables: the rates with their scores on held-out samples, and the runs on all samples with the chosen one."""
    metric = record["metric"]
    rates = Table(
        ["learning rate", f"{metric}, {100 * record['held_out']:g} % held out"],
        [[f"{trial['lr']:g}", _scored(trial, metric)] for trial in record["trials"]],
    )
    scored = [trial for trial in record["trials"] if "scores" in trial]
    best = [trial["lr"] for trial in scored if trial["scores"][metric] == _of(record, record["chosen"])]
    lines = [*rates.text(), f"chosen: {record['chosen']:g}" + (", the smallest of equal ones" if len(best) > 1 else "")]
    if len(record["trials"]) > 1 and record["chosen"] in (record["trials"][0]["lr"], record["trials"][-1]["lr"]):
        lines.append("note: it is at the end of sweep.lrs; beyond it there may be a better one")
    names = [name for name in record["mean"] if name.endswith(("/top1", "/top5"))]
    if not names:
        return "\n".join([*lines, "", "the runs on all samples have no score: data.eval is not set"])
    rows = [[str(run["seed"]), *(f"{100 * run['scores'][name]:.2f} %" for name in names)] for run in record["full"]]
    if len(rows) > 1:
        rows.append(["mean ± sd", *(f"{100 * record['mean'][n]:.2f} ± {100 * record['std'][n]:.2f} %" for n in names)])
    return "\n".join([*lines, "", *Table(["seed", *names], rows).text()])


def draw_sweep(record: Record) -> bytes:
    """The PNG: held-out score over learning rate, and where it was chosen the scores of the runs on all samples."""
    metric = record["metric"]
    scored = [(trial["lr"], 100 * trial["scores"][metric]) for trial in record["trials"] if "scores" in trial]
    full = [100 * run["scores"][metric] for run in record["full"] if metric in run.get("scores", {})]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot(*zip(*scored, strict=True), "o-", color=FILL, label=f"held-out, {100 * record['held_out']:g} %")
        if full:
            axes.plot([record["chosen"]] * len(full), full, "x", color="C1", label="data.eval, trained on all")
        mark(axes, record["chosen"])
        axes.set_xscale("log")
        axes.set_xticks([lr for lr, _ in scored], [f"{lr:g}" for lr, _ in scored])
        axes.minorticks_off()
        set_frame(axes, f"{metric} in %, by learning rate")
        axes.legend(fontsize=8)

    return draw_png(draw, 5.0, 3.5)


def _of(record: Record, rate: float) -> float:
    """The score of a rate."""
    trial = next(trial for trial in record["trials"] if trial["lr"] == rate)
    score: float = trial["scores"][record["metric"]]
    return score


def _scored(trial: Record, metric: str) -> str:
    return f"{100 * trial['scores'][metric]:.2f} %" if "scores" in trial else "diverged"
