"""`--check` says what a run would be, from its config, its data and its run folder, and leaves no trace."""

import json

import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_config, digits, run):
    folder = tmp_path_factory.mktemp("check")
    path = tiny_config(folder / "tiny.json", train={"steps": 2}, data={"eval": str(digits / "test")})
    assert run("launch/pretrain.py", "--config", path, "--out", folder / "trained").returncode == 0
    return folder


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_new_run_is_told_and_not_begun(home, run):
    before = files(home)
    done = run(
        "launch/pretrain.py", "--check", "--config", home / "tiny.json", "--out", home / "new",
        "train.steps=null", "train.epochs=2", ranks=2,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("tiny: ", "10 classes", "from seed 0", "1,442 samples", "steps 0 to 120", "batch 24 = 2 ranks × 1"):
        assert words in done.stdout
    assert files(home) == before


def test_a_resume_is_told_with_what_has_changed(home, run):
    before = files(home)
    words = ("launch/pretrain.py", "--check", "--config", home / "tiny.json", "--out", home / "trained")
    done = run(*words, "--extend", "train.steps=5", "data.eval=null")
    assert done.returncode == 0
    for text in ("resumed from", "step_00000002", "steps 2 to 5", "scores are of something else"):
        assert text in done.stdout
    refused = run(*words, "optimizer.lr=1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "optimizer.lr was 0.001, is 1" in refused.stderr
    assert "nothing to do" in run(*words).stdout
    assert files(home) == before


def test_a_damaged_checkpoint_is_told_and_left_where_it_is(home, run):
    words = ("launch/pretrain.py", "--config", home / "tiny.json", "--out", home / "damaged", "checkpoint.every=1")
    assert run(*words).returncode == 0
    damaged = home / "damaged/checkpoints/step_00000002/weights.00000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    before = files(home)
    done = run(*words, "--check")
    assert done.returncode == 0, done.stderr
    assert "step_00000002: damaged: weights.00000.safetensors has sha256" in done.stdout
    assert "step_00000001\n" in done.stdout
    assert files(home) == before


def test_fine_tuning_is_told_with_the_checkpoints_network(home, digits, run):
    task = {
        "name": "task", "model": {"image_size": 16, "num_classes": 10}, "data": {"train": str(digits / "train")},
        "train": {"global_batch": 8, "steps": 3}, "optimizer": {"name": "sgd", "lr": 0.1},
    }  # fmt: skip
    (home / "task.json").write_text(json.dumps(task))
    words = ("launch/finetune.py", "--check", "--config", home / "task.json", "--out", home / "tuned")
    done = run(*words, "--init", home / "trained")
    assert done.returncode == 0
    assert all(text in done.stdout for text in ("16 px (grid 4x4)", "step_00000002"))
    assert not (home / "tuned").exists()
    assert run(*words).returncode == 2, "without --init there is no network"


def test_data_at_fault_are_refused(home, run):
    done = run("launch/pretrain.py", "--check", "--config", home / "tiny.json", "--out", home / "x", "data.train=gone")
    assert done.returncode == 2
    assert "gone" in done.stderr
