"""Whatever happens to checkpoints, a run goes on from the newest whole one, or refuses with the file: never wrongly."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.step import Checkpoint, seal
from tests.conftest import history

STEPS, EVERY = 12, 4


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_config(
        tmp_path_factory.mktemp("config") / "damage.json",
        model={"width": 20, "mlp": 36, "heads": 2, "dropout": 0.1},
        data={"audit": True},
        train={"global_batch": 12, "steps": STEPS},
        optimizer={"weight_decay": 0.1, "averaging": {"decay": 0.9}},
        schedule={"warmup_steps": 2},
        checkpoint={"every": EVERY, "keep": 3},
        deepspeed={"zero_optimization": {"stage": 1}},
    )


@pytest.fixture(scope="module")
def train(config, run) -> Callable[..., tuple[object, str]]:
    """train(out, prelude="", ranks=2): the ranks' status, and what they say."""

    def train(out: Path, *, ranks: int = 2, prelude: str = "") -> tuple[object, str]:
        done = run("launch/pretrain.py", "--config", config, "--out", out, ranks=ranks, prelude=prelude)
        return done.returncode, done.stdout + done.stderr

    return train


def told(out: Path) -> tuple:
    """The run's losses and gradient norms, step by step, and its audits."""
    return history(out).trained


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to its end."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, said = train(out)
    assert status == 0, said
    assert len(history(out).losses) == STEPS
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """The run as it stood after 8 of its 12 steps, and a few more without a checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000008")
    return tmp_path / "run"


def step(out: Path, number: int) -> Path:
    return out / "checkpoints" / f"step_{number:08d}"


def flip(path: Path, place: float) -> None:
    """One bit, so far into the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def reword(path: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree, indent=1))


DAMAGES = {
    "weights cut short": ("weights.00001", lambda file: os.truncate(file, file.stat().st_size - 40)),
    "a bit of the weights": ("weights.00000", lambda file: flip(file, 0.8)),
    "a bit of a file's header": ("weights.00000", lambda file: flip(file, 0.01)),
    "a bit of the moments": ("optimizer.00001", lambda file: flip(file, 0.6)),
    "a bit of the average": ("average.00000", lambda file: flip(file, 0.7)),
    "no file of a rank": ("optimizer.00001", lambda file: file.unlink()),
    "zeros after a power cut": ("weights.00001", lambda file: file.write_bytes(bytes(file.stat().st_size))),
    "state.json torn": ("state.json", lambda file: os.truncate(file, file.stat().st_size // 2)),
    "state.json empty": ("state.json", lambda file: file.write_bytes(b"")),
    "state.json with another number": ("state.json", lambda file: reword(file, lambda tree: tree.update(updates=7))),
    "state.json of another step": ("state.json", lambda file: reword(file, lambda tree: tree.update(step=7))),
    "state.json without its files": ("state.json", lambda file: reword(file, lambda tree: tree.pop("files"))),
    "layout.json": ("layout.json", lambda file: flip(file, 0.5)),
}


@pytest.mark.parametrize(("name", "harm"), DAMAGES.values(), ids=list(DAMAGES))
def test_the_one_before_a_damaged_one_is_found_and_the_damage_told(name, harm, out):
    (victim,) = step(out, 8).glob(f"{name}*")
    harm(victim)
    found, passed_over = checkpoints.newest_verified(out / "checkpoints")
    assert found is not None
    assert found.path == step(out, 4)
    assert list(passed_over) == [step(out, 8)]
    assert passed_over[step(out, 8)].startswith(f"checkpoint {step(out, 8)}: ")
    assert victim.name in passed_over[step(out, 8)]


def test_a_run_resumes_from_the_one_before_a_damaged_one(train, whole, out):
    flip(step(out, 8) / "weights.00001.safetensors", 0.8)
    status, said = train(out)
    assert status == 0, said
    assert f"passed over: checkpoint {step(out, 8)}: damaged: weights.00001" in said, said
    assert f"resumed from {step(out, 4)}\n" in said
    assert (out / "checkpoints" / "damaged_00000008" / "layout.json").exists(), "kept for inspection"
    assert told(out) == told(whole)


UNSERVED = """
import errno, os
from pretrain import files

left, sha256 = [%d], files.sha256

def fails(path, *advance):
    if os.environ["RANK"] == "1" and "step_00000008" in str(path) and left[0]:
        left[0] -= 1
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    return sha256(path, *advance)

files.sha256, files._PAUSE = fails, 0.01
"""


def test_storage_that_fails_for_a_moment_is_no_damage(train, whole, out):
    status, said = train(out, prelude=UNSERVED % 3)
    assert status == 0, said
    assert f"resumed from {step(out, 8)}\n" in said
    assert "passed over" not in said
    assert told(out) == told(whole)


def test_storage_that_fails_for_longer_stops_the_run_and_the_same_command_goes_on(train, whole, out):
    before = told(out)
    for _ in range(2):
        status, said = train(out, prelude=UNSERVED % 100)
        assert status == 75, said
        assert said.count("stopped: ") == 1
        line = said.partition("stopped: ")[2].splitlines()[0]
        for words in (str(step(out, 8)), "Input/output error, 4 times (seen by rank 1)", "run the same command again"):
            assert words in line, said
    assert told(out) == before
    status, said = train(out)
    assert status == 0, said
    assert f"resumed from {step(out, 8)}\n" in said
    assert not list((out / "checkpoints").glob("damaged_*"))
    assert told(out) == told(whole)


@pytest.mark.parametrize("latest", [None, "step_00000004"])
def test_latest_is_for_people_a_run_goes_on_without_it(latest, train, whole, out):
    file = out / "checkpoints" / "latest"
    file.unlink() if latest is None else file.write_text(latest)
    status, said = train(out)
    assert status == 0, said
    assert f"resumed from {step(out, 8)}\n" in said
    assert "passed over" not in said
    assert file.read_text() == "step_00000012"
    assert told(out) == told(whole)


def test_where_all_are_damaged_the_run_is_refused_and_left_as_it_is(train, out):
    flip(step(out, 8) / "weights.00001.safetensors", 0.5)
    (step(out, 4) / "optimizer.00000.safetensors").unlink()
    before = told(out)
    status, said = train(out)
    assert status == 2, said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    for words in ("none that can be read", f"{step(out, 8)}: damaged: weights.00001", "optimizer.00000"):
        assert words in said, said
    assert told(out) == before


def forge(path: Path, name: str, change: Callable[[Path], None]) -> None:
    """Change a file of a checkpoint, and its hash with it, so that the file looks as it was written."""
    state = Checkpoint.read(path).state
    change(path / name)
    content = (path / name).read_bytes()
    state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "state.json").write_text(json.dumps({**state, "seal": seal(state)}))


def exchange(file: Path, kind: str) -> None:
    """Let two parameters of one size, as a norm's scale and shift, change places."""
    tensors = load_file(file)
    pairs = itertools.combinations([key for key in tensors if key.startswith(f"{kind}:")], 2)
    one, other = next(pair for pair in pairs if tensors[pair[0]].shape == tensors[pair[1]].shape)
    assert not tensors[one].equal(tensors[other])
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, file)


FORGERIES = {
    "weight": ("weights.00001.safetensors", lambda file: flip(file, 0.9)),
    "exp_avg": ("optimizer.00000.safetensors", lambda file: flip(file, 0.4)),
    "exp_avg_sq": ("optimizer.00001.safetensors", lambda file: flip(file, 0.9)),
    "average": ("average.00000.safetensors", lambda file: flip(file, 0.9)),
    "exp_avg, of another parameter": ("optimizer.00001.safetensors", lambda file: exchange(file, "exp_avg")),
}


@pytest.mark.parametrize(("kind", "name", "change"), [(kind, *forgery) for kind, forgery in FORGERIES.items()])
def test_what_the_hashes_do_not_show_the_fingerprints_do(kind, name, change, train, out):
    forge(step(out, 8), name, change)
    before = told(out)
    status, said = train(out)
    assert status == 2, said
    assert (
        f"error: checkpoint {step(out, 8)}: after loading, the fingerprint of {kind.partition(',')[0]} is " in said
    ), said
    assert told(out) == before


FULL = """
import errno, os
from pretrain import files
from pretrain.checkpoint import archive

def full(write):
    def fails(path, what):
        if "partial_%08d" in str(path) and path.name.startswith("%s"):
            path.write_bytes(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, what)
    return fails

archive.write, files.write_text = full(archive.write), full(files.write_text)
"""


@pytest.mark.parametrize("file", ["optimizer.00001", "state"])
def test_a_disk_that_fills_up_costs_a_save_and_no_more(file, train, whole, tmp_path):
    out = tmp_path / "run"
    status, said = train(out, prelude=FULL % (8, file))
    assert status == 0, said
    (line,) = [line for line in said.splitlines() if "could not be saved" in line]
    assert line.startswith("step 8 could not be saved: ")
    assert "No space left on device" in line
    assert file in line
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", "step_00000004", "step_00000012"]
    assert told(out) == told(whole)


@pytest.mark.parametrize("file", ["average.00001", "state"])
def test_a_last_save_that_fails_is_no_success(file, train, whole, tmp_path):
    out = tmp_path / "run"
    status, said = train(out, prelude=FULL % (STEPS, file))
    assert status == 2, said
    assert f"error: step {STEPS} could not be saved: " in said
    assert "No space left on device" in said
    assert (out / "checkpoints" / "latest").read_text() == "step_00000008"
    status, said = train(out)
    assert status == 0, said
    assert f"resumed from {step(out, 8)}\n" in said
    assert told(out) == told(whole)


ROOM = """
import shutil
from collections import namedtuple
from pretrain.training.saver import Saver

asked, missing = [], Saver._missing
shutil.disk_usage = lambda path: namedtuple("usage", "free")(1000 if len(asked) in %s else 2**40)

def count(self):
    asked.append(1)
    return missing(self)

Saver._missing = count
"""


def test_without_room_for_a_checkpoint_a_run_does_not_begin(train, tmp_path):
    status, said = train(tmp_path / "run", prelude=ROOM % "(1,)")
    assert status == 2, said
    assert "GiB free, a checkpoint takes " in said
    assert "make room" in said
    assert "step  1/" not in said


def test_without_room_amid_a_run_a_save_is_left_out(train, whole, tmp_path):
    out = tmp_path / "run"
    status, said = train(out, prelude=ROOM % "(3,)")  # at the start, before step 4, before step 8
    assert status == 0, said
    assert "step 8 could not be saved: " in said
    assert not step(out, 8).exists()
    assert step(out, STEPS).exists()
    assert told(out) == told(whole)
