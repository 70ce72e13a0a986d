"""Run folders as training writes them, without any training."""

import json
import math

CONFIG = {
    "name": "run",
    "seed": 0,
    "data": {"train": "digits", "eval": None},
    "train": {"steps": 100, "global_batch": 8, "loss": "softmax"},
    "optimizer": {"name": "adamw", "lr": 0.001},
    "network": {"patch_size": 2, "layers": 1},
    "git_commit": "abc",
    "command": ["launch/pretrain.py", "--config", "c.json"],
    "versions": {"torch": "2"},
}
BEGAN = 1_700_000_000.0


def line(step, loss, at=None, batch=8, **besides):
    """A training line."""
    values = {"images": step * batch, "epoch": step / 10, "loss": loss, "lr": 0.001, "grad_norm": 1.0}
    values |= {"images_per_second": 80.0, "mfu": None, "data_wait": 0.1}
    values |= {"time/training": 0.9, "time/waiting": 0.1} if at is not None else {}
    stamp = {} if at is None else {"at": at}
    return {"step": step, **values, **besides, **stamp}


def event(name, step, at, **besides):
    """An event; a start `besides` with 2 ranks unless told otherwise."""
    told = {"at": at, "event": name, "step": step}
    if name == "start":
        told |= {"began": at - 1, "ranks": 2, "hosts": 1, "device": "cpu", "zero_stage": 1, "micro_batch": 4}
    return told | besides


def write_run(folder, lines=(), events=(), discarded=(), quarantine=(), **config):
    """The folder of a run; `config`: sections laid over CONFIG."""
    folder.mkdir(parents=True)
    merged = {**CONFIG, **config, "train": {**CONFIG["train"], **config.get("train", {})}}
    (folder / "config.json").write_text(json.dumps(merged))
    of_names = {
        "metrics": lines,
        "events": events,
        "metrics.discarded": discarded,
        "quarantine": quarantine,
    }
    for name, records in of_names.items():
        if records:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def decay(step):
    """A loss that falls."""
    return 0.5 + 2 * math.exp(-step / 30)
