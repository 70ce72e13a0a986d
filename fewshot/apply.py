"""Saved probes on other images: what they say of each, and how much of it is right."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewshot import cache
from fewshot.cache import FeatureCache, NetworkFeatures, read_query
from fewshot.config import FewshotConfig
from fewshot.features import find_layer
from fewshot.report.report import describe_networks
from fewshot.saved import Origin, ProbeFile, SavedProbe
from fewshot.score import chunks, fp64_device, share_right
from fewshot.task import Paths
from pretrain import files
from pretrain.configfile import differences
from pretrain.console import say
from pretrain.errors import InputError
from pretrain.index.compare import check_classes
from pretrain.index.index import Index
from pretrain.page.text import Table
from pretrain.ranks.collectives import World, together
from pretrain.record.folder import git_commit, versions
from pretrain.record.reportfolder import REPORT, json_text, write_parts
from pretrain.stream.colour import colour_text
from pretrain.weights.networks import Network

FOLDER, PREDICTIONS = "applied", "predictions.npz"


@dataclass(frozen=True)
class Query:
    """The images that probes are applied to: all of an index. `labels` int64 [m], -1 for an image without one."""

    index: Index
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Applied:
    """What one probe says of the query images: classes int64 [m] and their scores fp64 [m].

    `accuracy`, in [0, 1], is that of the images with a label; None where there are none.
    """

    weights: str
    probe: SavedProbe
    predicted: NDArray[np.int64]
    scores: NDArray[np.float64]
    accuracy: float | None


def open_query(paths: Paths | None, saved: ProbeFile) -> Query:
    """Open `data.query`. Raises InputError: null, no index, several labels an image, other classes than the probes'."""
    if paths is None:
        raise InputError("data.query: null; set it to an INDEX, the images that probes are applied to: data.query=PATH")
    index = Index.open(paths if isinstance(paths, str) else list(paths))
    if index.longest > 1:
        raise InputError(f"data.query: {paths} has images with several labels; one or none an image would be right")
    check_classes(saved.names, index.classes, f"probes {saved.path}", "data.query")
    ids = np.arange(index.samples)
    labels = index.labels(ids)[:, 0] if index.longest else np.full(len(ids), -1)
    if labels.max() >= saved.classes:
        strange = int((labels >= saved.classes).sum())
        raise InputError(
            f"data.query: {strange} of {len(ids)} images have labels above {saved.classes - 1}, the highest of the "
            f"probes {saved.path}; both must number the same classes alike"
        )
    return Query(index, ids, labels)


def apply_probes(
    saved: ProbeFile, query: Query, networks: Sequence[Network], config: FewshotConfig, out: Path, world: World
) -> tuple[list[NetworkFeatures], list[Applied]]:
    """Apply to `query` every probe of `saved` that was fitted to features of one of `networks`. Collective.

    Features are computed, or read where `out` holds them. What is returned second is empty on all ranks but the first.
    Raises InputError: a network that no probe was fitted to, or whose features would be others here.
    """
    used, found = [], []
    for network in networks:
        weights = together(partial(network.source.read, network.averaged))
        probes = together(partial(_probes_of, saved, network, weights.sha256))
        wanted = _with_features(config, probes)
        images = {"query": (query.index, query.ids)}
        if world.main and (
            note := colour_text(network.spec.channels, query.index, "data.query", wanted.data.timeouts())
        ):
            say(f"note: {note}")
        features = FeatureCache(wanted, images, out / cache.FOLDER, world).features(network, weights)
        used.append(features)
        if world.main:
            found += [_apply(probe, features, query, fp64_device(world.device)) for probe in probes]
    return used, found


def report_applied(
    saved: ProbeFile,
    query: Query,
    features: Sequence[NetworkFeatures],
    applied: Sequence[Applied],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json. `run`: config, ranks and device."""
    labelled = int((query.labels >= 0).sum())
    return {
        "probes": {"path": str(saved.path), "sha256": files.sha256(saved.path)},
        "weights": describe_networks(features),
        "query": {
            "index": [str(file.path) for file in query.index.files],
            "index_sha256": query.index.hash,
            "images": len(query.ids),
            "labelled": labelled,
            "note": _unnamed(saved, query) if labelled else "",
        },
        "classes": saved.names,
        # As the rows of the arrays in PREDICTIONS.
        "results": [
            {
                "weights": one.weights,
                "probe": one.probe.probe,
                "features": one.probe.origin.feature,
                "shots": one.probe.shots,
                "seed": one.probe.seed,
                "l2": one.probe.l2,
                "accuracy": one.accuracy,
            }
            for one in applied
        ],
        "run": dict(run),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def write_applied(report: Mapping[str, Any], query: Query, applied: Sequence[Applied], out: Path) -> Path:
    """Write report.json and PREDICTIONS to `out`/applied. Returns the path of the first.

    PREDICTIONS holds ids int64 [m], labels int64 [m] (-1: none), predicted int64 [p, m], scores float64 [p, m]: the
    class that each of p probes gives each image, and the score it has.
    """
    predictions = io.BytesIO()
    np.savez_compressed(
        predictions,
        ids=query.ids,
        labels=query.labels,
        predicted=np.stack([one.predicted for one in applied]),
        scores=np.stack([one.scores for one in applied]),
    )
    write_parts(out / FOLDER, {PREDICTIONS: predictions.getvalue(), REPORT: json_text(report).encode()})
    return out / FOLDER / REPORT


def table(report: Mapping[str, Any]) -> str:
    """The console's table: the accuracy of each probe."""
    query = report["query"]
    rows = [
        [
            row["weights"],
            row["features"],
            row["probe"],
            str(row["shots"]),
            str(row["seed"]),
            "" if row["l2"] is None else f"{row['l2']:g}",
            "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}",
        ]
        for row in report["results"]
    ]
    head = ("weights", "features", "probe", "shots", "seed", "λ", "accuracy")
    title = f"Accuracy in % on {query['labelled']:,} labelled of {query['images']:,} query images"
    note = [f"note: {query['note']}"] if query["note"] else []
    return "\n".join([title, *Table(head, rows, names=3).text(), *note])


def _unnamed(saved: ProbeFile, query: Query) -> str:
    """A sentence where either side lacks class names that the other has; else empty."""
    if (saved.names is None) == (query.index.classes is None):
        return ""
    which = f"the probes {saved.path}" if saved.names is None else "data.query"
    return f"{which}: without names of classes, taken to number them as the other side does"


def _probes_of(saved: ProbeFile, network: Network, sha256: str) -> list[SavedProbe]:
    """The probes that were fitted to features of a network, all of which would be the same here."""
    chosen = [probe for probe in saved.probes if probe.origin.sha256 == sha256]
    if not chosen:
        theirs = ", ".join(dict.fromkeys(f"{probe.origin.sha256[:12]}…" for probe in saved.probes))
        raise InputError(
            f"--init {network.path}: these weights have sha256 {sha256[:12]}…, and the probes of {saved.path} were "
            f"fitted to features of {theirs}; the weights that they were fitted to would be right"
        )
    for probe in chosen:
        if find_layer(probe.origin.feature) is None:
            raise InputError(f"probes {saved.path}: of the feature {probe.origin.feature}, which is not known here")
        here = Origin.of(network, sha256, probe.origin.feature)
        for name, was, now in differences(asdict(probe.origin), asdict(here)):
            key = {"network.image_size": "model.image_size", "dtype": "fewshot.dtype"}.get(name)
            mend = f"{key}={was} would be right" if key else "fit the probes anew"
            raise InputError(f"probes {saved.path}: fitted with {name} {was}, and here it is {now}; {mend}")
    return chosen


def _with_features(config: FewshotConfig, probes: Sequence[SavedProbe]) -> FewshotConfig:
    """The config with the features that the probes take."""
    names = tuple(dict.fromkeys(probe.origin.feature for probe in probes))
    return config.model_copy(update={"fewshot": config.fewshot.model_copy(update={"features": names})})


def _apply(probe: SavedProbe, features: NetworkFeatures, query: Query, device: torch.device) -> Applied:
    name = probe.origin.feature
    linear = probe.linear.to(device)
    x = read_query(features.files[name], name, f"weights {features.network.path}")
    predicted, scores = [], []
    for chunk in chunks(x, device):
        found = linear(chunk)
        classes = found.argmax(dim=1)  # as when it was fitted: of equal ones the first
        predicted.append(classes.cpu().numpy())
        scores.append(found.gather(1, classes[:, None])[:, 0].cpu().numpy())
    classified, labelled = np.concatenate(predicted), query.labels >= 0
    accuracy = share_right(classified[labelled], query.labels[labelled]) if labelled.any() else None
    return Applied(features.network.id, probe, classified, np.concatenate(scores), accuracy)
