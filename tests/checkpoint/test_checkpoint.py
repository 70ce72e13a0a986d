"""Which checkpoints are found, passed over, kept and removed; what is damaged is never taken for whole."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from pretrain import files
from pretrain.checkpoint import archive, pieces
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.pieces import read_tensors
from pretrain.checkpoint.step import LAYOUT, STATE, Checkpoint
from pretrain.errors import InputError, StorageError

RANKS = 2
SHAPE = (3, 5)


def values() -> torch.Tensor:
    return torch.arange(15, dtype=torch.float32)


def place(folder: Path, step: int) -> Path:
    """A checkpoint of one parameter, of which rank 0 holds the first seven values, and its moments."""
    records = []
    for rank, (begin, end) in enumerate([(0, 7), (7, 15)]):
        tensors = {kind: [values()[begin:end] + 100 * number] for number, kind in enumerate(("weight", "exp_avg"))}
        aside = checkpoints.partial_path(folder, step)
        records.append(pieces.write_share(aside, rank, [("w", begin, end - begin)], tensors, {"w": 0}))
    return checkpoints.commit(folder, step, records, {"zero_stage": 1})


def cut(path: Path) -> None:
    file = path / "weights.00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "optimizer.00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_newest_whole_one_is_taken_and_newer_damaged_ones_are_named(tmp_path):
    place(tmp_path, 50)
    place(tmp_path, 55)
    damaged = place(tmp_path, 60)
    cut(damaged)
    found, passed_over = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 55
    assert (tmp_path / checkpoints.LATEST).read_text() == "step_00000060"
    assert list(passed_over) == [damaged]
    assert "weights.00001.safetensors has " in passed_over[damaged]


def test_one_that_is_whole_is_saved_though_latest_could_not_name_it(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place(tmp_path, 50)
    with monkeypatch.context() as no_room:
        no_room.setattr(checkpoints, "update_latest", full)
        assert place(tmp_path, 60) == tmp_path / "step_00000060"
    found, _ = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 60


def test_nothing_there_is_no_fault(tmp_path):
    assert checkpoints.newest(tmp_path / "checkpoints") == (None, {})


def test_what_two_ranks_wrote_is_read_as_one(tmp_path):
    saved = Checkpoint.read(place(tmp_path, 10))
    assert saved.step == 10
    assert torch.equal(read_tensors(saved, {"w": SHAPE})["w"], values().view(SHAPE))
    saved.verify()
    with pytest.raises(InputError, match="keeps no averaged weights"):
        read_tensors(saved, {"w": SHAPE}, averaged=True)
    with pytest.raises(InputError, match="holds no weight of w from value 15 on"):
        read_tensors(saved, {"w": (4, 5)})


def test_a_flipped_bit_shows_in_the_hash(tmp_path):
    saved = Checkpoint.read(place(tmp_path, 10))
    flip(saved.path)
    with pytest.raises(InputError, match=r"damaged: optimizer\.00000\.safetensors has sha256"):
        Checkpoint.read(saved.path).verify()


def test_an_interrupted_save_is_no_checkpoint_and_is_cleared(tmp_path):
    whole = place(tmp_path, 10)
    tensors = {"weight": [values()]}
    pieces.write_share(checkpoints.partial_path(tmp_path, 20), 0, [("w", 0, 15)], tensors, {"w": 0})
    found, passed_over = checkpoints.newest(tmp_path)
    assert found is not None
    assert (found.path, passed_over) == (whole, {})
    checkpoints.remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000010"]


def test_a_damaged_one_set_aside_does_not_count_among_those_kept(tmp_path):
    for step in (50, 55):
        place(tmp_path, step)
    checkpoints.set_aside([place(tmp_path, 60)])
    checkpoints.prune(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged_00000060", "latest", "step_00000055"]


def test_none_set_aside_takes_the_place_of_another(tmp_path):
    for content in ("first", "second", "third"):
        path = place(tmp_path, 60)
        (path / STATE).write_text(content)
        checkpoints.set_aside([path])
    found = {path.name: (path / STATE).read_text() for path in tmp_path.glob("damaged_*")}
    assert found == {"damaged_00000060": "first", "damaged_00000060.2": "second", "damaged_00000060.3": "third"}


@pytest.fixture
def failing(monkeypatch):
    """failing(owner, name, word, times): calls of owner.name about a path with `word` in it fail, the first `times`."""
    monkeypatch.setattr(files, "_PAUSE", 0.0)

    def failing(owner, name, word, times, number=errno.EIO):
        left, call = [times], getattr(owner, name)

        def fails(path, *args, **options):
            if word in str(path) and left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return call(path, *args, **options)

        monkeypatch.setattr(owner, name, fails)

    return failing


STORAGE = {
    "state.json": (Path, "read_text", "state.json"),
    "a size": (Path, "stat", "weights.00001"),
    "the folder": (os, "listdir", "run"),
}


@pytest.mark.parametrize(("owner", "name", "word"), STORAGE.values(), ids=list(STORAGE))
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_storage_does_not_serve_is_asked_for_again_and_never_passed_over(
    owner, name, word, number, failing, tmp_path
):
    folder = tmp_path / "run"
    for step in (10, 20):
        place(folder, step)
    failing(owner, name, word, 3, number)
    found, passed_over = checkpoints.newest(folder)
    assert found is not None
    assert (found.step, passed_over) == (20, {})
    failing(owner, name, word, 4, number)
    with pytest.raises(StorageError, match=f"{word}.*: cannot be read for now: {os.strerror(number)}, 4 times"):
        checkpoints.newest(folder)


def test_hashes_and_values_are_read_again_where_storage_does_not_serve_them(failing, tmp_path):
    saved = Checkpoint.read(place(tmp_path, 10))
    failing(files, "sha256", "optimizer.00000", 3)
    saved.verify()
    failing(archive, "safe_open", "weights.00000", 3)
    assert torch.equal(read_tensors(saved, {"w": SHAPE})["w"], values().view(SHAPE))
    failing(files, "sha256", "weights.00001", 4)
    with pytest.raises(StorageError, match=r"weights\.00001\.safetensors: cannot be read for now"):
        saved.verify()
    failing(archive, "safe_open", "weights.00001", 4)
    with pytest.raises(StorageError, match=r"weights\.00001\.safetensors: cannot be read for now"):
        read_tensors(saved, {"w": SHAPE})
    (saved.path / "weights.00001.safetensors").unlink()
    with pytest.raises(InputError, match=r"damaged: weights\.00001\.safetensors is missing"):
        saved.verify()


def test_a_check_counts_every_byte(tmp_path):
    saved, read = Checkpoint.read(place(tmp_path, 10)), []
    saved.verify(None, read.append)
    assert sum(read) == saved.bytes


@pytest.mark.parametrize(
    ("saved", "kept"),
    [((10, 20, 30, 40, 50), [20, 40, 50]), ((3, 13, 27, 33, 41, 55, 58), [27, 41, 55, 58])],
    ids=["by steps", "by the clock"],
)
def test_the_newest_and_the_first_of_every_so_many_steps_are_kept(saved, kept, tmp_path):
    for step in saved:
        place(tmp_path, step)
        checkpoints.prune(tmp_path, keep=2, keep_every=20)
    assert [int(path.name.removeprefix("step_")) for path in reversed(checkpoints.list_checkpoints(tmp_path))] == kept
    assert not list(tmp_path.glob("partial_*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "weights.00000.safetensors").unlink(), "weights.00000.safetensors is missing"),
        (lambda path: (path / LAYOUT).unlink(), "layout.json is missing"),
        (lambda path: (path / STATE).unlink(), "no state.json"),
        (lambda path: (path / STATE).write_text("{"), "state.json cannot be read"),
        (lambda path: (path / STATE).write_text('{"format": 99}'), "format 99"),
        (lambda path: (path / STATE).write_text("[]"), r"format \[\]"),
        (cut, r"weights\.00001\.safetensors has \d+ bytes"),
    ],
)
def test_what_is_not_whole_is_refused_with_the_file(damage, words, tmp_path):
    path = place(tmp_path, 10)
    damage(path)
    with pytest.raises(InputError, match=words):
        Checkpoint.read(path)


def test_a_folder_that_somebody_named_beside_them_is_left_alone(tmp_path):
    for step in (8, 16, 24):
        place(tmp_path, step)
    shutil.copytree(tmp_path / "step_00000008", tmp_path / "step_00000008_best")
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "step_00000024",
        "step_00000016",
        "step_00000008",
    ]
    checkpoints.prune(tmp_path, 1)
    checkpoints.remove_after(tmp_path, 4)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == []
    assert (tmp_path / "step_00000008_best").is_dir()


def test_latest_names_the_newest_that_is_left(tmp_path):
    for step in (8, 16, 24):
        place(tmp_path, step)
    checkpoints.remove_after(tmp_path, 16)
    assert (tmp_path / checkpoints.LATEST).read_text() == "step_00000016"
    checkpoints.set_aside([tmp_path / "step_00000016"])
    checkpoints.update_latest(tmp_path)
    assert (tmp_path / checkpoints.LATEST).read_text() == "step_00000008"
