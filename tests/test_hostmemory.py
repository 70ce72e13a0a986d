"""What a host has, and what a process took of it."""

import torch

from pretrain import hostmemory

GIB = 2**30


def test_what_was_given_back_counts_as_still_to_come():
    block = torch.ones(64 << 18)  # 64 MiB
    held = hostmemory.released_memory()
    del block
    assert hostmemory.released_memory() >= held + (60 << 20)
    assert hostmemory.available_memory() > 0


def test_a_control_group_s_limit_counts(tmp_path, monkeypatch):
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for group, limit in ((tmp_path / "job", 5 * GIB), (inner, "max")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{4 * GIB}\n")
        (group / "memory.stat").write_text(f"anon {GIB}\ninactive_file {GIB}\n")
    cgroup = tmp_path / "cgroup"
    cgroup.write_text("0::/job/step\n")
    monkeypatch.setattr(hostmemory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(hostmemory, "_OWN", cgroup)
    assert list(hostmemory._limited_groups()) == [(5 * GIB, 3 * GIB)]
    assert hostmemory.available_memory() <= 2 * GIB
    assert hostmemory.total_memory() <= 5 * GIB


def test_the_peak_can_begin_anew():
    hostmemory.restart_peak()
    before = hostmemory.peak_memory()
    block = torch.ones(64 << 18)  # 64 MiB: always given back
    assert hostmemory.peak_memory() >= before + (60 << 20)
    del block
    after = hostmemory.peak_memory()
    hostmemory.restart_peak()
    assert hostmemory.peak_memory() < after
