"""checkpoint.best in whole runs: saved off the beat, kept, and right after a kill or a roll-back."""

from pathlib import Path

import pytest

from pretrain.errors import InputError
from pretrain.training.evaluation import check_best
from pretrain.weights.load import load_weights
from tests.conftest import history, lines

STEPS = 10
# Evaluated every 2 steps, saved every 4: the best, 6, is saved for its score alone.
SCORES = """
from pretrain.training.evaluation import Validation

scores = {2: 0.1, 4: 0.5, 6: 0.9, 8: 0.3, 10: 0.9}
Validation.run = lambda self, model, step: iter([("eval/loss", 1.0), ("eval/top1", scores[step]), ("eval/top5", 1.0)])
"""


@pytest.fixture(scope="module")
def train(tiny_config, digits, run, tmp_path_factory):
    """train(out, prelude="", *overrides): status and output of two ranks."""
    config = tiny_config(
        tmp_path_factory.mktemp("config") / "best.json",
        data={"eval": str(digits / "test"), "audit": True},
        train={"steps": STEPS, "eval_every": 2},
        schedule={"warmup_steps": 2},
        checkpoint={"every": 4, "keep": 1, "best": "eval/top1"},
    )

    def train(out: Path, prelude: str = "", *overrides: str) -> tuple[object, str]:
        words = ("--config", config, "--out", out, *overrides)
        done = run("launch/pretrain.py", *words, ranks=2, prelude=SCORES + prelude)
        return done.returncode, done.stdout + done.stderr

    return train


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    status, said = train(out)
    assert status == 0, said
    return out


def kept(out: Path) -> tuple[str, list[str]]:
    return (out / "checkpoints" / "best").read_text(), history(out).checkpoints


def test_the_best_is_saved_kept_and_named_and_can_be_read(whole):
    assert kept(whole) == ("step_00000006", ["step_00000006", "step_00000010"])
    assert load_weights(whole / "checkpoints" / "best").step == 6


# Where all ranks die, and the step that the run then resumes from.
KILLS = {
    "after the evaluation": (
        4,
        "best.Best.beaten_by = lambda self, values: os._exit(9) if scores[6] in values.values() else True",
    ),
    "after the save": (
        6,
        "best.Best.name = lambda self, step, values: os._exit(9) if step == 6 else name(self, step, values)",
    ),
}


@pytest.mark.parametrize("place", KILLS)
def test_after_a_kill_before_it_was_named_it_is_the_same(place, train, whole, tmp_path):
    resumed, how = KILLS[place]
    prelude = f"import os\nfrom pretrain.record import best\nname = best.Best.name\n{how}\n"
    status, said = train(tmp_path / "run", prelude)
    assert status != 0, said
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["eval/top1"] == 0.9
    status, said = train(tmp_path / "run")
    assert status == 0, said
    assert f"step_{resumed:08d}\n" in said
    assert kept(tmp_path / "run") == kept(whole)
    assert history(tmp_path / "run").metrics == history(whole).metrics


BACK = """
from pretrain.engine.guards import Guard, RollBack
note, rolled = Guard.note, []

def back(self, step, *rest):
    note(self, step, *rest)
    if step == 6 and not rolled:
        rolled.append(True)
        scores[6] = 0.2
        raise RollBack(5, 6, "a spike")

Guard.note = back
"""


def test_after_a_roll_back_the_best_is_that_of_the_steps_before(train, tmp_path):
    status, said = train(tmp_path / "run", BACK, "train.steps=8", "checkpoint.keep=2")
    assert status == 0, said
    assert "went back to" in said
    assert kept(tmp_path / "run") == ("step_00000004", ["step_00000004", "step_00000008"])


def test_another_score_is_chosen_from_what_there_is(train, whole):
    """A resume under another metric; the run is finished, so it trains on for a little."""
    status, said = train(whole, "scores[12] = 0.0", "checkpoint.best=eval/loss", "train.steps=12", "--extend")
    assert status == 0, said
    assert kept(whole) == ("step_00000006", ["step_00000006", "step_00000012"])  # equal in loss: the first


def test_what_no_evaluation_gives_is_refused_with_what_there_is(train, tmp_path):
    status, said = train(tmp_path / "run", "", "checkpoint.best=eval/top2")
    assert status == 2, said
    assert "error: checkpoint.best: 'eval/top2' is no score of this run's evaluations; set one of eval/loss, " in said
    with pytest.raises(InputError, match=r"set data\.eval or fewshot"):
        check_best("eval/top1", [], averages=True)


def test_scores_of_the_average_are_offered_where_one_is_kept():
    evaluator = type("Evaluator", (), {"every": None, "scores": ("eval/top1",)})()
    check_best("averaged/eval/top1", [evaluator], averages=True)
    with pytest.raises(InputError, match=r"checkpoint\.best: 'averaged/eval/top1' is no score"):
        check_best("averaged/eval/top1", [evaluator], averages=False)
