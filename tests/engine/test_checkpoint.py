"""Which checkpoints are found, passed over, kept and removed."""

import json
from pathlib import Path

import pytest

from pretrain.engine import checkpoint
from pretrain.engine.guards import DivergedError, check_finite
from pretrain.errors import InputError


def place(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "states.pt").write_bytes(b"0" * (10 if whole else 9))
    state = {"format": checkpoint.FORMAT, "step": step, "files": {"states.pt": 10}}
    (path / checkpoint.STATE).write_text(json.dumps(state))
    return path


def test_the_newest_whole_one_is_taken_and_newer_damaged_ones_are_named(tmp_path):
    place(tmp_path, 50)
    place(tmp_path, 55)
    damaged = place(tmp_path, 60, whole=False)
    found, passed_over = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 55
    assert list(passed_over) == [damaged]
    assert "states.pt has 9 bytes, 10 bytes were written" in passed_over[damaged]


def test_nothing_there_is_no_fault(tmp_path):
    assert checkpoint.newest(tmp_path / "checkpoints") == (None, {})


def test_a_damaged_one_set_aside_does_not_count_among_those_kept(tmp_path):
    for step in (50, 55):
        place(tmp_path, step)
    checkpoint.set_aside([place(tmp_path, 60, whole=False)])
    checkpoint.prune(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_00000060", "step_00000055"]


def test_pruning_clears_what_an_interrupted_save_left(tmp_path):
    for step in (10, 20, 30):
        place(tmp_path, step)
    (tmp_path / "partial_00000010").mkdir()
    (tmp_path / "partial_00000010" / "half.pt").touch()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "states.pt").unlink(), "states.pt is missing"),
        (lambda path: (path / checkpoint.STATE).unlink(), "no state.json"),
        (lambda path: (path / checkpoint.STATE).write_text("{"), "state.json cannot be read"),
        (lambda path: (path / checkpoint.STATE).write_text('{"format": 99}'), "format 99"),
    ],
)
def test_what_is_not_whole_is_refused_with_the_file(damage, words, tmp_path):
    path = place(tmp_path, 10)
    damage(path)
    with pytest.raises(InputError, match=words):
        checkpoint.read(path)


def test_a_gradient_that_is_no_number_ends_the_run_before_it_is_saved():
    check_finite(3, 1.5)
    for norm in (float("nan"), float("inf"), -1.0):
        with pytest.raises(DivergedError, match="step 4: the gradient norm is"):
            check_finite(3, norm)
