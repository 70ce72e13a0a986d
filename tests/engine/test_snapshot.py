"""The copy that is saved from: what the engine held, and only where the host has room for it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain.engine import snapshot
from pretrain.engine.snapshot import Snapshot

GIB = 2**30


@pytest.fixture
def engine() -> SimpleNamespace:
    module = nn.Linear(64, 32)
    state = {parameter: {"exp_avg": torch.ones_like(parameter)} for parameter in module.parameters()}
    return SimpleNamespace(
        module=module,
        basic_optimizer=SimpleNamespace(kinds=("exp_avg",), state=state),
        zero_optimization_stage=lambda: 0,
        world_size=1,
        optimizer=None,
    )


def test_a_copy_stays_as_it_was_and_its_memory_is_used_again(engine):
    taken = Snapshot(engine)
    assert taken.bytes == 2 * 4 * (64 * 32 + 32)
    before = engine.module.weight.detach().clone()
    copy = taken.take()
    own = taken.values()
    engine.module.weight.data.zero_()
    assert torch.equal(copy["weight"][0], before.view(-1))
    assert not own["weight"][0].any(), "the engine's own"
    place = copy["weight"][0].data_ptr()
    assert not taken.take()["weight"][0].any()
    assert copy["weight"][0].data_ptr() == place


@pytest.mark.parametrize(("free", "to_come", "ranks", "room"), [
    (8.0, 0.0, 4, True), (4.0, 0.0, 4, False), (8.0, 1.0, 4, False), (8.0, 1.0, 1, True), (1.05, 0.0, 1, False),
])  # fmt: skip
def test_there_is_room_only_beside_what_all_ranks_will_take_again(engine, monkeypatch, free, to_come, ranks, room):
    monkeypatch.setattr(snapshot, "available_memory", lambda: int(free * GIB))
    monkeypatch.setattr(snapshot, "released_memory", lambda: int(to_come * GIB))
    monkeypatch.setattr(Snapshot, "bytes", GIB)
    said = Snapshot(engine).lacks(ranks)
    assert (said is None) == room
    assert room or f"{ranks:.1f} GiB of this host's memory" in said


def test_page_locked_memory_is_counted_as_torch_takes_it(engine, monkeypatch):
    locked = []

    class Accelerator:
        def device_name(self):
            return "cuda"

        def pin_memory(self, buffer):
            locked.append(buffer.nbytes)
            return buffer

        def synchronize(self):
            pass

    monkeypatch.setattr(snapshot, "get_accelerator", Accelerator)
    monkeypatch.setattr(snapshot, "released_memory", lambda: 0)
    taken = Snapshot(engine)
    assert taken.bytes == 2 * 8320
    assert taken.memory == 2 * 16384, "each buffer up to a power of two"
    for free, room in ((2 * 16384 * 1.2, True), (2 * 8320 * 1.2, False)):
        monkeypatch.setattr(snapshot, "available_memory", lambda free=free: int(free))
        assert (taken.lacks(1) is None) == room
    taken.take()
    assert locked == [8320, 8320]
    exact = Snapshot(engine)
    monkeypatch.setattr(Snapshot, "bytes", 2 * GIB)
    assert exact.memory == 2 * GIB, "already powers of two"
