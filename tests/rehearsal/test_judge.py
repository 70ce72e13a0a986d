"""Each finding of a rehearsal fails where the run would, and only there."""

import pytest

from pretrain.rehearsal import judge
from pretrain.rehearsal.findings import Finding, Report
from pretrain.rehearsal.judge import Limits

GB = 10**9
PLAN = {
    "parameters": 2 * GB, "gradients": 2 * GB, "optimizer": 4 * GB, "average": 0, "activations": GB, "buffers": GB,
    "total": 10 * GB, "without_checkpointing": 14 * GB,
}  # fmt: skip


def figures(**others):
    known = {
        "plan": PLAN, "resting_bytes": 0, "device_bytes": 16 * GB, "host_ranks": 1, "device": "GPU", "workers": 4,
        "peak_bytes": 10 * GB, "step_seconds": 0.5, "largest_bytes": 9000, "largest_seconds": 0.1, "unreadable": [],
        "live_images_per_second": 96.0, "cached_images_per_second": 100.0, "data_wait": 0.01,
        "loader_images_per_second": 150.0, "read_bytes_per_second": 5e6, "requests_per_second": 50.0,
        "requests_per_image": 0.1, "sample_bytes": 40_000.0,
    }  # fmt: skip
    return {**known, **others}


@pytest.mark.parametrize(
    ("given", "limits", "verdict", "change"),
    [
        ({}, Limits(), "ok", "could be off"),
        ({"device_bytes": 9 * GB}, Limits(), "fails", "micro_batch"),
        ({"device_bytes": 12 * GB}, Limits(), "ok", ""),
        ({}, Limits(device_memory=9 * GB), "fails", "micro_batch"),
        # Ranks of a CPU host share its memory, of which each has taken some before the run is built.
        ({"device_bytes": 24 * GB, "host_ranks": 2, "resting_bytes": GB}, Limits(), "ok", ""),
        ({"device_bytes": 24 * GB, "host_ranks": 2, "resting_bytes": 3 * GB}, Limits(), "fails", "micro_batch"),
    ],
)
def test_memory_planned(given, limits, verdict, change):
    found = judge.planned_memory(figures(**given), limits)
    assert found.verdict == verdict
    assert change in found.change
    assert bool(found.change) == bool(change)


def test_the_worst_step_is_that_of_the_rank_that_takes_most():
    assert judge.worst_step([figures(), figures()], Limits(), "").verdict == "ok"
    assert judge.worst_step([figures(), figures(peak_bytes=12 * GB)], Limits(), "").verdict == "note"
    assert judge.worst_step([figures(), figures(peak_bytes=17 * GB)], Limits(), "").verdict == "fails"


def test_a_rank_that_ran_out_of_memory_is_told_what_takes_less():
    ended = figures()
    del ended["peak_bytes"]
    found = judge.worst_step([figures(), ended], Limits(), "CUDA out of memory. Tried to allocate 2 GiB")
    assert (found.verdict, "micro_batch" in found.change) == ("fails", True)
    assert "out of memory" in found.seen
    other = judge.worst_step([ended], Limits(), "data.train: no such index")
    assert (other.verdict, "micro_batch" in other.change) == ("fails", False)


def test_a_slow_loader_is_told_from_one_that_disturbs():
    assert judge.loader([figures()], Limits()).verdict == "ok"
    slow = judge.loader([figures(live_images_per_second=60.0, loader_images_per_second=65.0)], Limits())
    assert (slow.verdict, "data.workers=8" in slow.change) == ("fails", True)
    disturbs = judge.loader([figures(live_images_per_second=60.0, loader_images_per_second=400.0)], Limits())
    assert (disturbs.verdict, "cores" in disturbs.change) == ("fails", True)
    assert judge.loader([figures(live_images_per_second=60.0)], Limits(live=0.5)).verdict == "ok"


def test_storage_gives_all_ranks_what_they_read():
    assert judge.storage([figures()]).verdict == "ok"
    assert judge.storage([figures(read_bytes_per_second=1.5e6)]).verdict == "fails"
    assert judge.storage([figures(read_bytes_per_second=2.1e6)] * 2).verdict == "ok"


def test_the_disk_holds_the_checkpoints_kept_and_one_more():
    assert judge.save(2.0, GB, 3 * GB, 3).verdict == "ok"
    assert judge.save(2.0, GB, 3 * GB - 1, 3).verdict == "fails"


@pytest.mark.parametrize(
    ("found", "half", "dropped", "verdict"),
    [
        ({3: 2.0, 4: 1.9}, False, False, "ok"),
        ({3: 2.0, 4: 1.91}, False, False, "fails"),
        ({3: 2.0, 4: 1.91}, True, False, "ok"),
        ({3: 2.0, 4: 2.9}, False, True, "fails"),
        ({5: 2.0}, False, False, "fails"),  # no step was made again
        ({3: float("nan"), 4: 1.9}, False, False, "fails"),
    ],
)
def test_losses_continue(found, half, dropped, verdict):
    assert judge.continued("restore", {3: 2.0, 4: 1.9}, found, half=half, dropped=dropped).verdict == verdict


def test_a_stop_counts_the_step_and_the_save_that_it_may_have_to_wait_for():
    assert judge.grace(2.0, 10.0, 15.0, [75, 75], Limits()).verdict == "ok"
    late = judge.grace(2.0, 10.0, 20.0, [75, 75], Limits())
    assert (late.verdict, "USR1@48" in late.change) == ("fails", True)
    assert judge.grace(2.0, 10.0, 20.0, [75, 75], Limits(grace=60)).verdict == "ok"
    assert judge.grace(2.0, 0.1, 0.1, [75, None], Limits()).verdict == "fails"


def test_scores_are_numbers():
    assert judge.scores("evaluation", {"eval/top1": 0.1}, 1.0).verdict == "ok"
    assert judge.scores("evaluation", {"eval/top1": 0.1, "eval/loss": None}, 1.0).verdict == "fails"
    assert judge.scores("few-shot", {}, 1.0).verdict == "fails"


def test_the_verdict_names_what_fails(tmp_path):
    findings = [Finding("save", "a", "b", "ok"), Finding("signal", "40 s", "30 s", "fails", "a longer grace period")]
    report = Report("h14", 8, 1, "GPU", 100.0, findings, {})
    assert report.verdict == "h14 would fail: signal"
    assert report.text().splitlines()[-2:] == ["signal: a longer grace period", "verdict: h14 would fail: signal"]
    page = report.write(tmp_path)[1].read_text()
    assert "a longer grace period" in page
    assert Report("h14", 8, 1, "GPU", 100.0, findings[:1], {}).failing == []
