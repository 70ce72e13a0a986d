"""What a host has, and what a process took of it."""

import mmap

from pretrain import hostmemory

GIB = 2**30


def block() -> mmap.mmap:
    """64 MiB that are this process's own and are given back when closed, whatever its allocator keeps."""
    found = mmap.mmap(-1, 64 << 20)
    found.write(b"1" * (64 << 20))
    return found


def test_what_was_given_back_counts_as_still_to_come():
    taken = block()
    held = hostmemory.released_memory()
    taken.close()
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
    taken = block()
    assert hostmemory.peak_memory() >= before + (60 << 20)
    taken.close()
    after = hostmemory.peak_memory()
    hostmemory.restart_peak()
    assert hostmemory.peak_memory() < after
