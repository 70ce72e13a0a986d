"""launch/finetune.py --sweep: the rate is chosen on held-out samples, and nothing that is finished is done again."""

import json
import math
import signal
from pathlib import Path

import pytest

from pretrain.history.history import RunHistory
from pretrain.history.hours import hours
from pretrain.index.index import Index
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.ranks.launcher import free_port
from pretrain.stream.heldout import hold_out
from tests.conftest import History, history

FINETUNE = "launch/finetune.py"
STEPS, SHARE, RATES, LOST = 31, 0.1, (0.0001, 0.05), 1e30  # 31 steps of 48 are an epoch and a bit
SPEC = ViTSpec(patch_size=4, layers=1, width=24, mlp=24, heads=3, image_size=8, channels=1, num_classes=10)
CONFIG = {
    "name": "swept",
    "model": {"num_classes": 10, "dropout": 0.1},
    "train": {"global_batch": 48, "steps": STEPS},
    "optimizer": {"name": "sgd", "lr": 0.03, "momentum": 0.9},
    "schedule": {"warmup_steps": 2, "decay": "cosine"},
    "checkpoint": {"every": 8},
    "logging": {"every": 1, "tensorboard": False, "peak_tflops": 1},
    "sweep": {"lrs": [LOST, *reversed(RATES)], "held_out": SHARE, "seeds": [0, 1]},
}
# Between steps of the run whose folder ends in PLACE: after step AT, from 0.
INTERRUPT = """
import os
from pathlib import Path
from pretrain.record.ledger import Ledger
inner = Ledger.step
def step(self, number, *rest):
    inner(self, number, *rest)
    folder = self._metrics._lines._path.parent
    if number == AT and str(folder).endswith(PLACE):
        ACTION
Ledger.step = step
"""
KILL = "os.kill(os.getpid(), 9)"
FINISHED = """
import os
from finetune.sweep import Sweep
def write(self, **options):
    if sum("scores" in trial for trial in self._record["trials"]) == 2:
        os.kill(os.getpid(), 9)
Sweep._write = write
"""


MOVED_ON = """
import os, shutil
from finetune.sweep import Sweep
inner = Sweep._write
def write(self, **options):
    inner(self, **options)
    if sum("scores" in trial for trial in self._record["trials"]) == 1:
        shutil.copytree("LATER/checkpoints/step_00000004", "NOW/checkpoints/step_00000004", dirs_exist_ok=True)
Sweep._write = write
"""


@pytest.fixture(scope="module")
def home(digits, run_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for seed in (0, 1):
        model = VisionTransformer(SPEC)
        initialize(model, seed)
        run_folder(folder / f"weights{seed}", model)
    data = {"train": str(digits / "train"), "eval": str(digits / "test"), "workers": 1, "audit": True, "flip": False}
    (folder / "swept.json").write_text(json.dumps({**CONFIG, "data": data}))
    return folder


def words(home: Path, out: Path | str, *more: object, weights: str = "weights0") -> tuple[object, ...]:
    return FINETUNE, "--config", home / "swept.json", "--init", home / weights, "--out", home / out, "--sweep", *more


@pytest.fixture(scope="module")
def undisturbed(home, run) -> Path:
    done = run(*words(home, "undisturbed"), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    (home / "undisturbed/console.txt").write_text(done.stdout)
    return home / "undisturbed"


def record(out: Path) -> dict:
    return json.loads((out / "sweep.json").read_text())


def of_rate(out: Path, rate: float) -> History:
    return history(out / f"sweep/lr_{rate}")


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """What training writes: times and contents."""
    found = (*folder.rglob("metrics*.jsonl"), *folder.rglob("audit/*"), *folder.rglob("step_*/*"))
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_the_rate_that_scores_best_on_held_out_samples_is_chosen(undisturbed):
    told = record(undisturbed)
    assert [trial["lr"] for trial in told["trials"]] == [*RATES, LOST]
    scores = {rate: of_rate(undisturbed, rate).metrics[-1]["eval/top1"] for rate in RATES}
    assert {trial["lr"]: trial["scores"]["eval/top1"] for trial in told["trials"][:2]} == scores
    assert told["chosen"] == max(RATES, key=lambda rate: scores[rate])
    assert "updates in a row were skipped" in told["trials"][2]["diverged"]
    assert told["origin"]["source"].endswith("weights0/checkpoints/step_00000003")
    assert (undisturbed / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert set(told["trials"][0]["scores"]) == {"eval/loss", "eval/top1", "eval/top5"}


def test_each_run_of_a_sweep_begins_when_its_turn_has_come(undisturbed):
    folders = [undisturbed / f"sweep/lr_{rate}" for rate in (*RATES, LOST)]
    folders += [undisturbed / f"full/seed_{seed}" for seed in (0, 1)]
    spans = []
    for folder in folders:
        [attempt] = hours(RunHistory.read(folder)).attempts
        assert (attempt.ranks, attempt.attempt.end["event"]) == (2, "failed" if folder == folders[2] else "finished")
        assert abs(attempt.seconds["other"]) <= 0.01 * attempt.wall
        spans += [attempt.attempt.began, attempt.attempt.last]
    assert spans == sorted(spans), "one after the other, no second in two of them"


def test_no_run_that_chooses_trains_on_a_held_out_sample_and_the_full_runs_train_on_all(undisturbed, digits):
    index = Index.open(digits / "train")
    trained, held = (set(ids.tolist()) for ids in hold_out(index, SHARE))
    for rate in RATES:
        told = of_rate(undisturbed, rate)
        assert {number for step in told.ids for number in step} == trained
        score = told.metrics[-1]["eval/top1"] * len(held)
        assert score == pytest.approx(round(score))
    for seed in (0, 1):
        told = history(undisturbed / f"full/seed_{seed}")
        assert {number for step in told.ids for number in step} == trained | held == set(range(index.samples))
        score = told.metrics[-1]["eval/top1"] * Index.open(digits / "test").samples
        assert score == pytest.approx(round(score))


def test_the_full_runs_are_those_of_the_chosen_rate_and_their_mean_is_told(undisturbed, home, run):
    """The first run of a process and its fifth are the same, to the last bit."""
    told = record(undisturbed)
    alone = (word for word in words(home, "alone", f"optimizer.lr={told['chosen']}", "seed=1") if word != "--sweep")
    done = run(*alone, ranks=2)
    assert done.returncode == 0, done.stderr
    assert history(home / "alone").trained == history(undisturbed / "full/seed_1").trained
    one, other = (history(undisturbed / f"full/seed_{seed}").metrics[-1]["eval/top1"] for seed in (0, 1))
    assert told["mean"]["eval/top1"] == pytest.approx((one + other) / 2)
    assert told["std"]["eval/top1"] == pytest.approx(abs(one - other) / math.sqrt(2)), "ddof 1"
    console = (undisturbed / "console.txt").read_text()
    assert f"chosen: {told['chosen']:g}" in console
    assert f"{100 * (one + other) / 2:.2f} ± {100 * abs(one - other) / math.sqrt(2):.2f} %" in console
    assert console.splitlines()[-1] == f"sweep: {undisturbed / 'sweep.json'}"


def test_a_sweep_and_a_single_run_do_not_share_a_folder(undisturbed, home, run, tmp_path):
    without = run(*(word for word in words(home, undisturbed) if word != "--sweep"), ranks=2)
    assert without.returncode == 2
    assert f"{undisturbed}: holds a sweep; give --sweep to resume it" in without.stderr
    (tmp_path / "config.json").write_text("{}")
    swept = run(*words(home, tmp_path))
    assert swept.returncode == 2
    assert f"--sweep: {tmp_path} holds a single run" in swept.stderr


def test_a_finished_sweep_is_told_again_and_nothing_is_trained(undisturbed, home, run):
    before, told = files(undisturbed), record(undisturbed)
    again = run(*words(home, undisturbed), ranks=2)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("nothing to do") == 4
    assert "lr_1e+30: diverged: step" in again.stdout
    assert "images/s" not in again.stdout
    assert (files(undisturbed), record(undisturbed)) == (before, told)


def test_killed_and_stopped_it_resumes_and_trains_no_finished_rate_again(undisturbed, home, run):
    out = home / "killed"
    stop = f"Path({str(out / 'STOP')!r}).touch()"
    places = [
        (INTERRUPT.replace("AT", "12").replace("PLACE", "'lr_0.0001'").replace("ACTION", KILL), -signal.SIGKILL, []),
        (INTERRUPT.replace("AT", "20").replace("PLACE", "'lr_0.05'").replace("ACTION", stop), 75, ["sweep/lr_0.0001"]),
        (FINISHED, -signal.SIGKILL, ["sweep/lr_0.0001", "sweep/lr_0.05"]),
        (
            INTERRUPT.replace("AT", "18").replace("PLACE", "'seed_1'").replace("ACTION", KILL),
            -signal.SIGKILL,
            ["sweep/lr_0.0001", "sweep/lr_0.05", "full/seed_0"],
        ),
    ]
    finished: dict[Path, tuple[int, bytes]] = {}
    for prelude, status, done in places:
        ended = run(*words(home, out), ranks=2, prelude=prelude)
        assert ended.returncode == status, ended.stdout + ended.stderr
        now = {path: content for folder in done for path, content in files(out / folder).items()}
        assert {path: now[path] for path in finished} == finished
        finished = now
        assert not (out / "STOP").exists()
    ended = run(*words(home, out), ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert {path: content for path, content in files(out).items() if path in finished} == finished
    for folder in ("sweep/lr_0.0001", "sweep/lr_0.05", "full/seed_0", "full/seed_1"):
        assert history(out / folder).trained == history(undisturbed / folder).trained, folder
    assert {**record(out), "origin": None} == {**record(undisturbed), "origin": None}


@pytest.mark.parametrize(
    ("changes", "weights", "found"),
    [
        (["data.eval_crop=whole"], "weights0", 'data.eval_crop was "centre", is "whole"'),
        (
            ["optimizer.momentum=0.8", "sweep.held_out=0.2"],
            "weights0",
            "optimizer.momentum was 0.9, is 0.8; sweep.held",
        ),
        (["data.eval=null"], "weights0", "data.eval: its index's hash was "),
        ([], "weights1", "began from weights of"),
        (["sweep.lrs=[0.0001]"], "weights0", "of sweep.lrs 0.0001 is the best by eval/top1 now"),
    ],
)
def test_a_sweep_of_something_else_is_refused(undisturbed, home, run, changes, weights, found):
    before = record(undisturbed)
    done = run(*words(home, undisturbed, *changes, weights=weights))
    assert done.returncode == 2, done.stdout + done.stderr
    assert found in done.stderr
    if "sweep.lrs" not in str(changes):
        assert record(undisturbed) == before


def test_weights_that_move_on_amid_a_sweep_are_refused(home, run, run_folder):
    """A run that is still trained saves another checkpoint: the next rate would begin from other weights."""
    for name, seed, step in (("moving", 0, 3), ("later", 1, 4)):
        model = VisionTransformer(SPEC)
        initialize(model, seed)
        run_folder(home / name, model, step=step)
    prelude = MOVED_ON.replace("LATER", str(home / "later")).replace("NOW", str(home / "moving"))
    more = ("train.steps=4", "sweep.seeds=null", "schedule.warmup_steps=0")
    done = run(*words(home, "moved", *more, weights="moving"), prelude=prelude)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "(step 4, sha256" in done.stderr
    first = home / "moving/checkpoints/step_00000003"
    assert f"all runs of a sweep begin from the same weights: --init {first} would be right" in done.stderr
    assert not (home / "moved/sweep/lr_0.05").exists()
    done = run(*words(home, "moved", *more, weights="moving/checkpoints/step_00000003"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (["sweep=null"], '--sweep: config swept has no section sweep; as in sweep={"lrs": [0.003, 0.01'),
        (["data.held_out=0.1"], "data.held_out: 0.1, but with --sweep the last runs train on all samples"),
        (["sweep.metric=averaged/eval/top1"], 'no average is kept; "eval/top1" would be right'),
        (["sweep.lrs=[0.1,0.1]"], "name each once"),
        (["--extend"], "--extend goes with one run"),
        (["checkpoint.best=eval/top1", "data.eval=null"], "checkpoint.best"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(home, run, changes, found):
    done = run(*words(home, "refused", *changes))
    assert done.returncode == 2, done.stdout + done.stderr
    assert found in done.stderr
    assert not list((home / "refused").glob("sweep/*/metrics.jsonl"))


def test_a_check_says_what_the_runs_would_be_and_writes_nothing(home, run):
    done = run(*words(home, "checked", "--check"))
    assert done.returncode == 0, done.stderr
    for name in ("swept-lr_0.0001: ", "swept-lr_0.05: ", "swept-seed_0: ", "swept-seed_1: "):
        assert name in done.stdout
    assert not (home / "checked").exists()


@pytest.mark.long
def test_the_real_command_sweeps_under_zero_3_and_goes_on_after_a_kill_of_everything(home, real, run):
    launcher = ("deepspeed", "--quiet", "--master_port", free_port(), "--num_gpus", 2)
    command = words(home, "real", 'deepspeed={"zero_optimization":{"stage":3}}')
    kill = INTERRUPT.replace("AT", "12").replace("PLACE", "'lr_0.05'").replace("ACTION", KILL)
    assert run(*command, ranks=2, prelude=kill).returncode == -signal.SIGKILL
    before = files(home / "real/sweep/lr_0.0001")
    done = real(*launcher, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(home / "real/sweep/lr_0.0001") == before
    told = record(home / "real")
    assert told["chosen"] in RATES
    assert "mean ± sd" in done.stdout
