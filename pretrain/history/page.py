"""The page of one run or several."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain import files
from pretrain.errors import InputError
from pretrain.history.curves import charts, loss_chart
from pretrain.history.history import RunHistory
from pretrain.history.hours import Hours
from pretrain.history.marks import ending, marks, starts_table
from pretrain.history.overlay import Overlay, flat
from pretrain.history.saved import saved_checkpoints
from pretrain.history.scores import leading_score, score_charts, scores_table
from pretrain.history.series import COLUMNS, Series
from pretrain.history.timeline import device_hours, ledger_table, timeline_chart
from pretrain.page.page import Page
from pretrain.page.text import Table, bytes_text, duration_text, number_text, sentence, shortened
from pretrain.record.folder import scores_in
from pretrain.record.section import TELLING

NAME = "run.html"
_NAMED = 4  # runs in the title
_SHOWN = 60  # letters of a value that differs between configs


def run_page(overlay: Overlay) -> Page:
    """The page of the runs. Raises InputError where a line holds what is no number."""
    runs = overlay.runs
    page = Page(_title(overlay))
    if len(runs) == 1:
        page.cards(headline(runs[0], overlay.hours[0]) | leading_score(runs[0]))
    else:
        page.table(_runs_table(overlay))
    page.notes(_faults(overlay), warning=True)
    loss = loss_chart(overlay)
    page.grid([*([loss] if loss else []), *charts(overlay)])
    page.notes(_reading(overlay))
    if evaluated := scores_table(overlay):
        page.heading("Evaluations while training")
        page.grid(score_charts(overlay))
        page.table(evaluated)
    timeline = timeline_chart(overlay)
    if timeline:
        page.heading("Attempts and time")
        page.grid([timeline])
        for run, told, label in zip(runs, overlay.hours, overlay.labels, strict=True):
            if run.attempts:
                of_run = f", {label}" if len(runs) > 1 else ""
                page.table(starts_table(run, f"Starts{of_run}"))
                page.table(ledger_table(told, f"Time{of_run}"))
                between = f"between attempts {duration_text(told.between)}, which are in no {device_hours(told)}"
                page.notes(map(sentence, [*([between] if told.between else []), *told.notes]))
    page.heading("What the runs are" if len(runs) > 1 else "What the run is")
    page.notes(
        ["python launch/report.py RUN --verify proves from a run's files what it was fed and how its resumes went on."]
    )
    if len(runs) > 1:
        page.table(_differences_table(overlay))
    for run, label in zip(runs, overlay.labels, strict=True):
        page.facts(({"run": label} if len(runs) > 1 else {}) | protocol(run))
        if command := run.config.get("command"):
            page.command(shlex.join(map(str, command)))
        if kept := checkpoints_table(run, label if len(runs) > 1 else ""):
            page.table(kept)
    return page


def _title(overlay: Overlay) -> str:
    more = [f"{len(overlay.labels) - _NAMED} more"] if len(overlay.labels) > _NAMED else []
    return "Run" + "s" * (len(overlay.runs) > 1) + " " + " · ".join([*overlay.labels[:_NAMED], *more])


# How it stands


def state(run: RunHistory) -> str:
    """Whether the run is going on, or how it ended."""
    if run.attempts:
        return ending(run, len(run.attempts) - 1)
    if run.under_way:
        return "going on"
    return "finished" if run.step >= run.steps else "stopped or killed"


def headline(run: RunHistory, told: Hours) -> dict[str, str]:
    """The figures that come first."""
    found = {"state": state(run), "steps": f"{run.step:,} of {run.steps:,}"}
    if run.lines:
        found["images"] = f"{run.lines[-1]['images']:,}"
        found["epoch"] = f"{run.lines[-1]['epoch']:,.2f}"
        for name, title in (("loss", "loss, smoothed"), ("images_per_second", "images/s, smoothed")):
            known = Series.of(run.lines, name).smoothed().known
            found[title] = number_text(known.y[-1]) if len(known.y) else "no number"
    if told.attempts:
        found[device_hours(told)] = number_text(told.gpu_hours)
    return found


def _runs_table(overlay: Overlay) -> Table:
    of_runs = [headline(run, told) | leading_score(run) for run, told in zip(overlay.runs, overlay.hours, strict=True)]
    names = list(dict.fromkeys(name for found in of_runs for name in found))
    rows = [
        [label, *(found.get(name, "–") for name in names)] for label, found in zip(overlay.labels, of_runs, strict=True)
    ]
    return Table(["run", *names], rows)


def summary(overlay: Overlay) -> list[str]:
    """For the console: how each run stands, and what its last evaluation found."""
    found = []
    for run, told, label in zip(overlay.runs, overlay.hours, overlay.labels, strict=True):
        figures = headline(run, told)
        found.append(f"{label}: {'  '.join(f'{name} {figure}' for name, figure in figures.items())}")
        if run.evaluations:
            last = run.evaluations[-1]
            named = [f"{name} {'nan' if value is None else f'{value:.4g}'}" for name, value in scores_in(last).items()]
            found.append(f"  step {last['step']:,}: {'  '.join(named)}")
    return [*found, *_faults(overlay)]


def _faults(overlay: Overlay) -> list[str]:
    """What is amiss with the runs, or not known of them, a sentence each."""
    found = []
    for run, label in zip(overlay.runs, overlay.labels, strict=True):
        for words in _faults_of(run):
            found.append(f"{label}: {words}." if len(overlay.runs) > 1 else sentence(words))
    return found


def _faults_of(run: RunHistory) -> Iterable[str]:
    if not run.lines:
        yield "no training step has been logged yet"
    if none := [line["step"] for line in run.lines if line["loss"] is None]:
        yield (
            f"the loss was no number at {len(none):,} logged step{'s' * (len(none) > 1)}, the first {none[0]:,}, the "
            f"last {none[-1]:,}; its curve has a gap there"
        )
    if not run.events:
        yield (
            f"there is no {run.folder.events.name}, which earlier versions did not write: starts, saves and what the "
            "time went to are not known"
        )


def _reading(overlay: Overlay) -> list[str]:
    """How to read the charts."""
    longest = max((Series.of(run.lines, "loss") for run in overlay.runs), key=lambda series: len(series.x))
    found = []
    if any(mark.lane == "slow rank" for run in overlay.runs for mark in marks(run)):
        found.append(
            f"Slow rank: one takes more than {TELLING:g} times as long as the usual one for data and forward pass."
        )
    if len(longest.x) > 2 * COLUMNS:
        found.append(
            f"Faint: from the least to the largest of the values in each of {COLUMNS:,} parts of the axis, so no peak "
            "is lost; the line is the mean of the smoothed values there."
        )
    elif longest.span > 1:
        found.append("Faint: each logged value.")
    if longest.span > 1:
        found.append(
            f"Smoothed: exponential average over {longest.span:,} logged values, a fiftieth of them (weight "
            f"{1 - 1 / longest.span:.4g}), without a bias towards the first, as in TensorBoard."
        )
    if any(run.discarded for run in overlay.runs):
        found.append("Dotted curves: steps that a resume or a roll-back took back and that were trained again.")
    if any(len(run.attempts) > 1 for run in overlay.runs):
        found.append("Dotted upright lines: resumes.")
    if overlay.by_images:
        found.append("The axis counts images, because the runs' global batches differ.")
    return found


# What it is


def protocol(run: RunHistory) -> dict[str, str]:
    """The recorded facts of a run: network, data, recipe, versions."""
    config, train = run.config, run.config["train"]
    data = config.get("data", {})
    found = {
        "folder": str(run.folder.path),
        "network": _listed(config.get("network") or config.get("model")),
        "began from": _listed(config.get("origin")),
        "data.train": flat({"train": data.get("train")})["train"],
        "data.eval": flat({"eval": data.get("eval")})["eval"],
        "index": _index(run),
        "recipe": f"{run.steps:,} steps of {run.global_batch:,} images, loss {train.get('loss')}",
        "optimizer": _listed(config.get("optimizer")),
        "schedule": _listed(config.get("schedule")),
        "seed": str(config.get("seed")),
        "commit": str(config.get("git_commit")),
        "versions": _listed(config.get("versions")),
    }
    return {name: text for name, text in found.items() if text not in ("", "None", "null")}


def _listed(section: dict[str, Any] | None) -> str:
    """The values of a section that are set."""
    return ", ".join(f"{name} {value}" for name, value in flat(section or {}).items() if value != "null")


def _index(run: RunHistory) -> str:
    """The hash of the index that the newest checkpoint's order is of."""
    streams = (saved.state["stream"] for saved in saved_checkpoints(run.folder)[:1])
    return next((f"{stream['index_hash']}, {stream['samples']:,} samples" for stream in streams), "")


def checkpoints_table(run: RunHistory, caption: str = "") -> Table | None:
    """A row for each checkpoint in the folder, the newest first."""
    rows = [
        [
            saved.path.name,
            f"{saved.state['step']:,}",
            ", ".join(saved.named),
            bytes_text(saved.bytes),
            str(saved.state["ranks"]),
            str(saved.state["zero_stage"]),
            time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(saved.written)),
            saved.state["seal"][:12],
        ]
        for saved in saved_checkpoints(run.folder)
    ]
    if not rows:
        return None
    header = ["checkpoint", "step", "named", "size", "ranks", "ZeRO", "written (UTC)", "seal"]
    return Table(header, rows, f"Checkpoints, {caption}" if caption else "Checkpoints")


def _differences_table(overlay: Overlay) -> Table:
    rows = [[key, *(shortened(value, _SHOWN) for value in values)] for key, values in overlay.differences().items()]
    return Table(["key", *overlay.labels], rows or [["none", *["" for _ in overlay.runs]]], "Where the configs differ")


def write_page(overlay: Overlay, out: Path) -> Path:
    """Write the page into the folder `out`, made if need be; returns its path. Raises InputError as `run_page`."""
    page = run_page(overlay)
    try:
        files.make_folder(out)
        page.write(out / NAME)
    except InputError as error:
        raise InputError(f"{error}; another --out would be right") from None
    return out / NAME
