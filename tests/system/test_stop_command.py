"""Asked to stop, by whatever way, all ranks save the same step, end with status 75, and the same command resumes."""

import signal
import time
from pathlib import Path

import pytest

from benchmarks.started import Command, Forked, Started
from pretrain.checkpoint.step import Checkpoint
from tests.conftest import history, lines

STEPS, FEW = 120, 8  # FEW: of a run that is stopped at a place of its own, so that speed does not matter
ALL: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_config(
        tmp_path_factory.mktemp("config") / "stopped.json",
        model={"layers": 2, "width": 48, "mlp": 96, "dropout": 0.1, "image_size": 16},
        data={"audit": True},
        train={"steps": STEPS},
        optimizer={"weight_decay": 0.1, "averaging": {"decay": 0.99}},
        deepspeed={"zero_optimization": {"stage": 1}},
    )


def run(config: Path, out: Path, *words: object) -> str:
    ranks = Forked(2, ["--config", config, "--out", out, *words], out.with_suffix(".txt"))
    try:
        assert ranks.wait() == [0, 0], ranks.said
        return ranks.said
    finally:
        ranks.kill()


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(config, out)
    return history(out).trained


@pytest.fixture(scope="module")
def undisturbed_few(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    out = tmp_path_factory.mktemp("undisturbed_few") / "run"
    run(config, out, f"train.steps={FEW}")
    return history(out).trained


def reach(started: Started, steps: int) -> None:
    deadline = time.monotonic() + 600
    while started.said.count("\nstep ") < steps:
        assert started.running, started.said
        assert time.monotonic() < deadline, started.said
        time.sleep(0.002)


def stopped(started: Started, out: Path, reason: str, steps: int = STEPS) -> int:
    """The step of which every rank's share is in the checkpoint; it is the last one that was made."""
    assert f"stopped: {reason}; run the same command again to resume" in started.said, started.said
    last = lines(out / "metrics.jsonl")[-1]["step"]
    assert last < steps
    assert (out / "checkpoints" / "latest").read_text() == f"step_{last:08d}"
    saved = Checkpoint.read(out / "checkpoints" / f"step_{last:08d}")
    saved.verify()
    assert saved.state["ranks"] == 2
    for rank in range(2):
        assert lines(out / "audit" / f"rank_{rank:05d}.jsonl")[-1]["step"] == last - 1, f"counted from 0, rank {rank}"
    assert not (out / "STOP").exists()
    return last


@pytest.mark.parametrize(
    ("number", "ranks", "reason"),
    [
        (signal.SIGTERM, (1,), "another rank was asked to stop"),
        pytest.param(signal.SIGTERM, ALL, "SIGTERM", marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, ALL, "SIGUSR1", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, (0,), "SIGTERM", marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, (1,), "another rank was asked to stop", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, ALL, "SIGINT", marks=pytest.mark.long),
    ],
)
def test_a_signal_to_some_ranks_or_all_is_one_stop(number, ranks, reason, config, undisturbed, tmp_path):
    out = tmp_path / "run"
    started = Forked(2, ["--config", config, "--out", out], tmp_path / "said.txt")
    try:
        reach(started, 7)
        started.send(number, *ranks)
        assert started.wait() == [75, 75], started.said
    finally:
        started.kill()
    last = stopped(started, out, reason)
    assert f"resumed from {out / 'checkpoints'}/step_{last:08d}" in run(config, out)
    assert history(out).trained == undisturbed


@pytest.mark.parametrize("way", ["file", "time limit"])
def test_a_file_or_the_clock_is_one_stop(way, config, undisturbed, tmp_path):
    out = tmp_path / "run"
    limit = ["train.time_limit_minutes=0.01"] if way == "time limit" else []
    started = Forked(2, ["--config", config, "--out", out, *limit], tmp_path / "said.txt")
    try:
        if way == "file":
            reach(started, 3)
            (out / "STOP").touch()
        assert started.wait() == [75, 75], started.said
    finally:
        started.kill()
    stopped(started, out, "train.time_limit_minutes is reached" if limit else f"{out / 'STOP'} exists")
    run(config, out)
    assert history(out).trained == undisturbed


# The save of step 11 is slow, and fails: when the last step is done it is still under way.
FAILS = """
import errno, os, time
from pretrain.checkpoint import pieces
def write_share(path, *rest, real=pieces.write_share):
    if path.name.endswith("00000011"):
        time.sleep(3)
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real(path, *rest)
pieces.write_share = write_share
"""


def test_a_save_that_fails_under_way_does_not_cost_the_one_that_ends_the_run(config, tmp_path):
    out = tmp_path / "run"
    words = ["--config", config, "--out", out, "train.steps=12", "checkpoint.every=11"]
    started = Forked(2, words, tmp_path / "said.txt", prelude=FAILS)
    try:
        assert started.wait() == [0, 0], started.said
    finally:
        started.kill()
    assert started.said.count("step 11 could not be saved") == 1
    assert (out / "checkpoints" / "latest").read_text() == "step_00000012"


def test_a_run_stopped_at_its_first_step_goes_on(config, undisturbed_few, tmp_path):
    """As when the last job of a queue has hardly begun before its time is up."""
    out, few = tmp_path / "run", f"train.steps={FEW}"
    listens = (
        "import os, signal; from pretrain.ranks.stop import listen; listen(); os.kill(os.getpid(), signal.SIGUSR1)"
    )
    started = Forked(2, ["--config", config, "--out", out, few], tmp_path / "said.txt", prelude=listens)
    try:
        assert started.wait() == [75, 75], started.said
    finally:
        started.kill()
    assert stopped(started, out, "SIGUSR1", FEW) == 1
    run(config, out, few)
    assert history(out).trained == undisturbed_few


# Rank 1 is asked to stop at a batch of an evaluation, of which every rank makes a note.
ASKED = """
import os, signal
from pretrain.images.transforms import to_float
from pretrain.training import evaluation
import fewshot.features

def asks(module, asked, seen):
    def noted(*args):
        seen.append(1)
        print("evaluates", flush=True)
        if len(seen) == asked and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return to_float(*args)
    module.to_float = noted

asks(evaluation, %d, [])
asks(fewshot.features, %d, [])
"""
# Of an evaluation a rank makes 15 batches, few-shot 1 and 3 more; then all again with the average.


@pytest.mark.parametrize(
    ("validation", "few_shot", "stage", "step", "batches"),
    [
        pytest.param(18, 0, 1, 4, 15 + 4 + 3, id="of the average"),
        pytest.param(33, 0, 1, FEW, 2 * (15 + 4) + 3, id="after the last step"),
        pytest.param(0, 3, 1, 4, 15 + 3, id="few-shot"),
        pytest.param(3, 0, 1, 4, 3, id="early", marks=pytest.mark.long),
        pytest.param(18, 0, 3, 4, 15 + 4 + 3, id="ZeRO 3", marks=pytest.mark.long),
    ],
)
def test_an_evaluation_is_left_at_its_next_batch_and_made_when_the_run_goes_on(
    validation, few_shot, stage, step, batches, config, digits, undisturbed_few, tmp_path
):
    out = tmp_path / "run"
    words = [
        f"train.steps={FEW}", f"data.eval={digits / 'test'}", "train.eval_every=4", "fewshot.every=4",
        "fewshot.shots=[1]", f"fewshot.support={digits / 'train'}", f"fewshot.query={digits / 'test'}",
        f"deepspeed.zero_optimization.stage={stage}",
    ]  # fmt: skip
    prelude = ASKED % (validation, few_shot)
    started = Forked(2, ["--config", config, "--out", out, *words], tmp_path / "said.txt", prelude=prelude)
    try:
        assert started.wait() == [75, 75], started.said
    finally:
        started.kill()
    assert started.said.count("stopped: another rank was asked to stop") == 1, started.said
    assert started.said.count("evaluates") == 2 * batches
    assert (out / "checkpoints" / "latest").read_text() == f"step_{step:08d}"
    told = lines(out / "metrics.jsonl")
    assert told[-1]["step"] == step
    assert [line["step"] for line in told if "eval/loss" in line] == [4] * (step > 4)
    assert f"resumed from {out / 'checkpoints'}/step_{step:08d}" in run(config, out, *words)
    evaluations = [line for line in lines(out / "metrics.jsonl") if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [4, FEW]
    assert all({"averaged/eval/top1", "fewshot/1shot_ridge"} <= set(line) for line in evaluations)
    if stage == 1:
        assert history(out).trained == undisturbed_few
    else:  # sums in another order
        for (done, *values), (also, *others) in zip(history(out).losses, undisturbed_few[0], strict=True):
            assert done == also
            assert values == pytest.approx(others, rel=1e-3)


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGTERM, ALL),
        pytest.param(signal.SIGUSR1, (0, 1), marks=pytest.mark.long),
        pytest.param(signal.SIGINT, ALL, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_real_commands_group_saves_one_step_of_all_ranks(number, ranks, config, undisturbed, tmp_path):
    out = tmp_path / "run"
    command = Command(2, ["--config", config, "--out", out], tmp_path / "said.txt")
    try:
        reach(command, 7)
        ours = set(command.pids)
        assert len(ours) == 2
        command.send(number, *ranks)
        assert command.wait() != [None], command.said
        deadline = time.monotonic() + 600
        while ours & set(command.pids):  # deepspeed may be gone before what it has started
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if number == signal.SIGUSR1:  # which deepspeed itself does not see, and so tells the ranks' status
            assert command.wait() == [75]
    finally:
        command.kill()
    stopped(command, out, number.name)
    run(config, out)
    assert history(out).trained == undisturbed
