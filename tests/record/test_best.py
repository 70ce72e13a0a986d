"""Which checkpoint is the best: the one with the best score among those that exist."""

import json

import pytest

from pretrain.checkpoint import folder as checkpoints
from pretrain.record.best import Best
from pretrain.record.folder import RunFolder

SCORES = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.9, 10: None}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run that was evaluated every two steps, with the checkpoints of all of them."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    lines = [{"step": step, "eval/loss": step / 10, "eval/top1": score} for step, score in SCORES.items()]
    lines += [{"step": 9, "loss": 0.1, "lr": 0.1}, {"step": 12, "eval/loss": 9.0, "averaged/eval/top1": 1.0}]
    torn = '{"step": 14, "eval/loss": 0.01, "eval/top1": 0.99'
    folder.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + torn)
    for step in (*SCORES, 12, 14):
        checkpoints.step_path(folder.checkpoints, step).mkdir()
    return folder


def named(folder: RunFolder) -> str | None:
    file = folder.checkpoints / "best"
    return file.read_text() if file.exists() else None


@pytest.mark.parametrize(
    ("metric", "gone", "best"),
    [
        ("eval/top1", (), 4),  # of two equal ones the first
        ("eval/top1", (4,), 8),
        ("eval/top1", (4, 8), 6),
        ("eval/top1", (2, 4, 6, 8), None),
        ("eval/loss", (), 2),  # the lowest
        ("averaged/eval/top1", (), 12),
        ("averaged/eval/loss", (), None),
    ],
)
def test_it_is_found_from_the_scores_and_the_checkpoints_that_exist(metric, gone, best, folder):
    (folder.checkpoints / "best").write_text("step_00000010")
    for step in gone:
        checkpoints.step_path(folder.checkpoints, step).rmdir()
    Best(folder, metric)
    assert named(folder) == (None if best is None else f"step_{best:08d}")


def test_it_is_that_of_the_steps_which_a_run_goes_back_to(folder):
    Best(folder, "eval/top1")
    folder.rewind(3)
    checkpoints.remove_after(folder.checkpoints, 3)
    assert Best(folder, "eval/top1").score == 0.5
    assert named(folder) == "step_00000002"


def test_better_is_strictly_better_and_no_number_never_is(folder):
    best = Best(folder, "eval/top1")
    assert [best.beaten_by({"eval/top1": score}) for score in (0.89, 0.9, float("nan"), 0.91)] == [False] * 3 + [True]
    assert not best.beaten_by({"eval/loss": 0.0})
    best.name(12, {"eval/top1": 0.95})
    assert (named(folder), best.beaten_by({"eval/top1": 0.93})) == ("step_00000012", False)
    loss = Best(folder, "eval/loss")
    assert [loss.beaten_by({"eval/loss": score}) for score in (0.2, 0.19)] == [False, True]


def test_it_is_never_removed(folder):
    Best(folder, "eval/top1")
    checkpoints.prune(folder.checkpoints, keep=2)
    assert [path.name for path in checkpoints.list_checkpoints(folder.checkpoints)] == [
        "step_00000014",
        "step_00000012",
        "step_00000004",
    ]
