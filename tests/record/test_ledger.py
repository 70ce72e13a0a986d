"""A run's books over a few steps: audit lines, faults and metrics of the same steps, in one process."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.engine.step import Agreement, Update
from pretrain.errors import StorageError
from pretrain.index.index import SampleExtent
from pretrain.ranks.collectives import World
from pretrain.record.events import Events
from pretrain.record.folder import RunFolder
from pretrain.record.inspection import Inspection
from pretrain.record.ledger import Audit, Ledger
from pretrain.record.metrics import Metrics, Workload
from pretrain.record.pulse import Pulse
from pretrain.record.quarantine import Quarantine
from pretrain.record.section import LoggingSection
from pretrain.stream.counters import Counters
from pretrain.stream.fault import Fault
from pretrain.stream.section import DataSection

ALONE = World(0, 1, 0, torch.device("cpu"))


class Index:
    """Where any sample lies."""

    def extents(self, ids):
        return [SampleExtent("a.tar", 512, 1024, first_id=int(ids[0]), count=1)]


@pytest.fixture
def kept():
    """Steps whose state was saved for inspection."""
    return []


@pytest.fixture
def ledger(tmp_path, kept):
    folder = RunFolder(tmp_path)
    folder.create()
    workload = Workload(steps=3, global_batch=2, samples=10, flops_per_image=1, peak_flops=None)

    def save(step, *, wait, folder):
        kept.append(step)
        (folder / f"step_{step:08d}").mkdir(parents=True)
        return True

    return Ledger(
        Audit(folder, 0, True),
        Quarantine(folder, Index(), ALONE, DataSection(max_unreadable=0.5, unreadable_chunks="quarantine"), 2),
        Metrics(folder, ALONE, LoggingSection(every=1, tensorboard=False), workload, Counters()),
        Inspection(folder, ALONE, save),
        Events(folder, ALONE),
    )


def batch(*ids, faults=()):
    return SimpleNamespace(ids=np.array(ids), faults=list(faults))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_steps_micro_batches_faults_and_loss_are_told_under_the_same_step(ledger, tmp_path):
    pulse = Pulse(SimpleNamespace(beat=lambda step, part: None), ALONE.device)
    fault = Fault(3, 0, "3", "not an image")
    for step, batches in enumerate([[batch(5), batch(3, faults=[fault])], [batch(1), batch(2)]]):
        for one in pulse.batches(step, batches):
            ledger.add(one)
        assert ledger.faulty == (step == 0)
        if ledger.faulty:
            ledger.check(step)
        ledger.step(step, Agreement(0.5 + step, ()), Update(0.1, 1.0, None), pulse)
    ledger.close()
    assert lines(tmp_path / "audit/rank_00000.jsonl") == [{"step": 0, "ids": [5, 3]}, {"step": 1, "ids": [1, 2]}]
    assert [(line["step"], line["id"]) for line in lines(tmp_path / "quarantine.jsonl")] == [(0, 3)]
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["images"], line["loss"]) for line in metrics] == [(1, 2, 0.5), (2, 4, 1.5)]


def test_a_chunk_that_storage_does_not_serve_ends_the_run(ledger):
    ledger.add(batch(3, faults=[Fault(3, 0, None, "no answer", passing=True)]))
    with pytest.raises(StorageError, match="step 1: no answer"):
        ledger.check(0)


def test_a_skipped_step_keeps_its_state_and_its_batch(ledger, kept, tmp_path):
    ledger.add(batch(5, 3))
    ledger.inspect(0, float("nan"), "the loss is nan")
    assert kept == [0]
    said = json.loads((tmp_path / "inspection/step_00000000/batch_00000.json").read_text())
    assert said == {"step": 0, "reason": "the loss is nan", "loss": "nan", "ids": [5, 3]}
