"""What the file system refuses: everywhere an InputError with path, reason and mend, and nothing left behind.

Tests may run as root, whom permissions do not stop: what is locked is asked for as another user.
"""

import errno
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fewshot.cache import read_feature, write_features
from fewshot.given import read_given
from pretrain import files
from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint import pieces
from pretrain.configfile import read_config
from pretrain.datasets.dataset import array_dataset
from pretrain.datasets.sources import open_source
from pretrain.errors import FileSystemError, InputError, StorageError
from pretrain.index.index import Index
from pretrain.page.page import check_target
from pretrain.ranks.collectives import World, together
from pretrain.ranks.stop import Stop
from pretrain.record.claim import claimed
from pretrain.record.folder import RunFolder
from pretrain.shards.scan import index_shards
from pretrain.shards.write import write_shards
from pretrain.storage.location import expand
from pretrain.training.config import RunConfig
from pretrain.weights.load import find

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
NOBODY = 65_534


@pytest.fixture
def place():
    """A folder that every user may search, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for locked in folder.rglob("*"):
        if locked.is_dir() and not locked.is_symlink():
            locked.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def as_another():
    """From its call on, this process is a user's who owns nothing."""
    before = os.geteuid()
    yield lambda: os.seteuid(NOBODY) if before == 0 else None
    os.seteuid(before)


@contextmanager
def small_disk(most):
    """Inside, no file of this process grows beyond so many bytes: EFBIG, where a full disk says ENOSPC.

    No longer than that: pytest's own output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def told(ask, *words) -> str:
    """What a command says of what `ask` refuses."""
    try:
        ask(*words)
    except InputError as error:
        return str(error)
    except OSError as error:
        return str(files.refusal(error))
    raise AssertionError("not refused")


ASKED = {
    "--config": lambda path: read_config(RunConfig, path),
    "data.train": Index.open,
    "--init": find,
    "--out": lambda path: RunFolder(path).create(),
    "--features": read_given,
    "SHARDS": lambda path: expand([path]),
    "SOURCE": lambda path: open_source(str(path)),
    "build's folder": lambda path: write_shards(small(), path),
    "index's folder": lambda path: index_shards([path.parent.parent / "a.tar"], path / "a.vfi"),
    "--html": check_target,
}


def small(rows: int = 4):
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), np.uint8)
    return array_dataset("noise", "all", pixels, np.zeros(rows, np.int32), ["noise"])


@pytest.mark.parametrize("ask", ASKED.values(), ids=list(ASKED))
def test_what_may_not_be_looked_at_is_not_said_to_be_missing(ask, place, as_another):
    locked = place / "locked"
    (locked / "it").mkdir(parents=True)
    (place / "a.tar").touch()
    locked.chmod(0o700)
    as_another()
    said = told(ask, locked / "it")
    assert said.startswith(f"{locked / 'it'}"), said
    assert f"Permission denied ({locked} is drwx------ of " in said
    assert said.endswith("; have it opened, or name another place")


@pytest.mark.parametrize("ask", ASKED.values(), ids=list(ASKED))
def test_names_that_lead_nowhere_are_told_as_that(ask, tmp_path):
    (tmp_path / "a.tar").touch()
    (tmp_path / "x").mkdir()
    long, loop = tmp_path / "x" / ("n" * 300), tmp_path / "x" / "loop"
    loop.symlink_to(loop)
    assert f"{long}" in (said := told(ask, long))
    assert "File name too long; a shorter name would be right" in said
    assert f"{loop}" in (said := told(ask, loop))
    assert "its links lead to one another" in said or "File exists" in said


def test_text_that_can_name_nothing_is_told_as_that():
    for text in ("a\0b", "a\ud800b"):
        with pytest.raises(InputError, match="not a path"):
            files.exists(text)


def test_a_file_in_the_middle_of_a_path_is_told_where_something_is_to_be_made(tmp_path):
    (tmp_path / "file").touch()
    assert not files.exists(tmp_path / "file" / "run")
    said = told(RunFolder(tmp_path / "file" / "run").create)
    assert said == f"{tmp_path}/file/run: Not a directory; a part of it is a file; name a folder"
    assert told(RunFolder(tmp_path / "file").create).startswith(f"{tmp_path}/file: File exists; ")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("/nowhere/there")
    with pytest.raises(InputError, match=r"link: a link to /nowhere/there, which is not there"):
        files.make_folder(tmp_path / "link")
    with pytest.raises(InputError, match=r"/proc/none: no folder can be made here"):
        files.make_folder(Path("/proc/none"))


def test_a_folder_that_may_not_be_written_to_is_refused_before_anything_is_computed(place, as_another):
    (place / "run").mkdir(mode=0o755)
    as_another()
    said = told(RunFolder(place / "run").create)
    assert said.startswith(f"{place}/run: Permission denied ({place}/run is drwxr-xr-x of "), said


def test_a_run_that_could_not_save_is_refused_before_it_trains(place, as_another, tmp_path):
    (place / "run").mkdir(mode=0o777)
    (place / "run").chmod(0o777)
    (place / "run/checkpoints").mkdir(mode=0o755)
    (tmp_path / "checkpoints").touch()
    assert told(RunFolder(tmp_path).create).startswith(f"{tmp_path}/checkpoints: File exists; ")
    as_another()
    said = told(RunFolder(place / "run").create)
    where = f"{place}/run/checkpoints"
    assert said.startswith(f"{where}: Permission denied ({where} is drwxr-xr-x of "), said


def test_a_claim_that_another_user_holds_the_file_of_is_refused(place, as_another):
    place.chmod(0o777)
    (place / ".claim").touch(mode=0o644)
    as_another()
    with pytest.raises(FileSystemError, match=rf"\.claim: Permission denied \({place}/\.claim is -rw-r--r-- of "):
        claimed(place, ALONE).__enter__()


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over_as_damaged(place, as_another):
    for step in (10, 20):
        aside = checkpoints.partial_path(place, step)
        record = pieces.write_share(aside, 0, [("w", 0, 2)], {"weight": [torch.zeros(2)]}, {"w": 0})
        newest = checkpoints.commit(place, step, [record], {})
    (newest / "state.json").chmod(0)
    as_another()
    with pytest.raises(FileSystemError, match=r"step_00000020/state\.json: Permission denied"):
        checkpoints.newest_verified(place)


def test_histories_that_cannot_be_rewound_are_refused(place, as_another):
    (place / "metrics.jsonl").mkdir()
    assert told(RunFolder(place).rewind, 1) == f"{place}/metrics.jsonl: Is a directory; a file would be right"
    (place / "metrics.jsonl").rmdir()
    (place / "audit").mkdir(mode=0o711)
    as_another()
    assert told(RunFolder(place).rewind, 1).startswith(f"{place}/audit: Permission denied ({place}/audit is drwx--x--x")


def test_a_stop_that_cannot_be_taken_away_is_told_and_the_run_ends_well(tmp_path, capsys):
    (tmp_path / "STOP").mkdir()
    Stop(tmp_path, ALONE).done()
    assert f"{tmp_path}/STOP: cannot be removed: Is a directory" in capsys.readouterr().out


def test_ranks_agree_on_what_the_file_system_says(tmp_path, monkeypatch):
    def refuses(number, name):
        def check():
            raise OSError(number, os.strerror(number), name)

        return check

    with pytest.raises(FileSystemError, match=r"^x: Disk quota exceeded; make room there"):
        together(refuses(errno.EDQUOT, "x"))
    with pytest.raises(StorageError, match=r"^x: cannot be reached for now: Stale file handle"):
        together(refuses(errno.ESTALE, "x"))
    for number, name in ((errno.ENOENT, "x"), (errno.ENOSPC, None)):  # a defect, or nobody knows where
        with pytest.raises(OSError, match=os.strerror(number)):
            together(refuses(number, name))
    monkeypatch.setattr(files, "_PAUSE", 0)
    with pytest.raises(OSError, match=r"Permission denied: 'y'"):
        files.patiently(Path("y"), refuses(errno.EACCES, None))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    with (
        small_disk(1000),
        pytest.raises(OSError, match="File too large") as ended,
        files.atomic_write(tmp_path / "it") as file,
    ):
        file.write(bytes(5000))
    assert str(files.refusal(ended.value)).startswith(f"{tmp_path}/it: File too large; lift the limit")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_may_not_replace_names_the_folder(place, as_another):
    (place / "it").touch()
    as_another()
    with pytest.raises(PermissionError) as ended, files.atomic_write(place / "it"):
        pass
    assert str(files.refusal(ended.value)).startswith(f"{place}: Permission denied ({place} is drwxr-xr-x of ")


def test_a_build_on_a_full_disk_leaves_no_partial_shard(tmp_path):
    with small_disk(30_000), pytest.raises(FileSystemError, match=f"^{tmp_path}/set: File too large"):
        write_shards(small(40), tmp_path / "set")
    assert list((tmp_path / "set").iterdir()) == []


def test_features_on_a_full_disk_leave_nothing(tmp_path):
    path = tmp_path / "features" / "f.npz"
    with small_disk(30_000):
        said = told(write_features, path, {"query_x": np.zeros((1000, 100))})
    assert said.startswith(f"{path}: File too large"), said
    assert list(path.parent.iterdir()) == []


def test_features_that_may_not_be_read_are_not_told_as_damaged(place, as_another):
    np.savez(place / "f.npz", x=np.zeros(1))
    (place / "f.npz").chmod(0)
    as_another()
    for ask in (lambda: read_given(place / "f.npz"), lambda: read_feature(place / "f.npz", "x", "it")):
        assert told(ask).startswith(f"{place}/f.npz: Permission denied ({place}/f.npz is ----------")


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.npz", "vit.pth", "vit"])
def test_an_empty_file_of_weights_is_not_told_as_a_missing_folder(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"^weights {tmp_path}/{name}: (cannot be read|torch cannot|ends in nothing)"):
        find(tmp_path / name)


@pytest.mark.parametrize("ask", [ASKED[name] for name in ("--config", "data.train", "--features", "SHARDS")])
def test_a_pipe_is_not_waited_for(ask, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in told(ask, tmp_path / "pipe")
