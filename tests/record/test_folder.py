"""The run folder's files tell one history, whatever interrupted the run."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch

from pretrain.errors import InputError
from pretrain.ranks.collectives import World
from pretrain.record.folder import RunFolder
from pretrain.training.config import RunConfig
from pretrain.training.experiment import begin


def jsonl(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_rewinding_moves_later_lines_aside_and_drops_a_torn_one(tmp_path):
    metrics, audit = tmp_path / "metrics.jsonl", tmp_path / "audit" / "rank_00001.jsonl"
    audit.parent.mkdir()
    metrics.write_text(jsonl(*({"step": step} for step in (1, 2, 3, 4))) + '{"step": 5, "lo')
    audit.write_text(jsonl(*({"step": step, "ids": [step]} for step in (0, 1, 2, 3))) + '{"step"')

    RunFolder(tmp_path).rewind(2)

    assert metrics.read_text() == jsonl({"step": 1}, {"step": 2}), "steps completed, from 1"
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == jsonl({"step": 3}, {"step": 4})
    assert audit.read_text() == jsonl({"step": 0, "ids": [0]}, {"step": 1, "ids": [1]}), "step numbers, from 0"
    assert (tmp_path / "audit" / "rank_00001.discarded.jsonl").read_text().count("\n") == 2

    RunFolder(tmp_path).rewind(1)
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == jsonl({"step": 3}, {"step": 4}, {"step": 2})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"{oops", "line 2 is no JSON"),
        (b"[1]", "line 2 tells no step"),
        (b'{"ids": [1]}', "line 2 tells no step"),
        (b'{"step": null}', "line 2 tells no step"),
        (b'{"step": "\xff"}', "byte 22 is not UTF-8"),
    ],
)
def test_a_damaged_line_within_is_named_and_nothing_is_dropped(line, found, tmp_path):
    text = jsonl({"step": 1}).encode() + line + b"\n" + jsonl({"step": 2}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with pytest.raises(InputError, match=rf"metrics\.jsonl: {found}"):
        RunFolder(tmp_path).rewind(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == text


def test_a_disk_that_is_full_as_a_run_begins_is_told_and_nothing_stays_behind(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = RunFolder(tmp_path / "run")
    folder.create()
    config = RunConfig(
        name="full",
        model={"arch": "vit_ti_16", "num_classes": 2},
        train={"global_batch": 2, "steps": 2},
        optimizer={"lr": 0.1},
        schedule={},
        deepspeed={},
    )
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    setup = SimpleNamespace(
        as_read=config, config=config, resolved={"train": {}}, folder=folder, world=alone, origin={"seed": 0}
    )
    before = {*folder.path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=f"^{folder.path}/config.json: No space left on device; make room there, or"):
        begin(setup, 0, {})
    assert {*folder.path.iterdir()} == before


def test_the_config_record_says_what_it_ran_under(tmp_path):
    RunFolder(tmp_path / "run").create()
    RunFolder(tmp_path / "run").write_config({"name": "a"})
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["name"] == "a"
    assert {"torch", "deepspeed", "webdataset", "python"} <= set(record["versions"])
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.json", "checkpoints"}, "nothing is left beside it"
