"""Saves, evaluations and stops between steps, with a saver and an engine that note what they are asked for."""

import pytest
import torch

from pretrain.engine.guards import RollBack
from pretrain.errors import DivergedError, InputError, StorageError
from pretrain.training.keeper import Keeper
from pretrain.training.saver import SaveError


class Engine:
    """Enough of an engine to be evaluated."""

    def __init__(self):
        self.module, self.device = torch.nn.Identity(), torch.device("cpu")
        self.basic_optimizer = type("Optimizer", (), {"averages": False})

    def eval(self):
        self.module.eval()


class Saver:
    """Notes what it is asked for; `saved` is the last step that is safe."""

    writing = False

    def __init__(self):
        self.calls, self.saved, self.asked = [], 0, False

    def due(self, done):
        return self.asked

    def save(self, done, *, wait):
        self.calls.append(("save", done, wait))
        self.saved = done

    def ensure(self, done):
        if self.saved < done:
            self.calls.append(("ensure", done))
            self.saved = done

    def finish(self):
        self.calls.append(("finish",))

    def prune(self):
        self.calls.append(("prune",))


class Stop:
    """Asks for a stop once `after` questions were answered with no."""

    def __init__(self, after=10**6):
        self.after = after

    def asked(self):
        self.after -= 1
        return self.after < 0


class Pulse:
    """Notes beats."""

    def __init__(self):
        self.beats = []

    def beat(self, step, part):
        self.beats.append((step, part))

    def paused(self, what):
        return torch.no_grad()  # any context


class Best:
    """Notes what it names; every step from 3 on is better than those before."""

    metric, score = "eval/step", None

    def beaten_by(self, values):
        return values["eval/step"] >= 3

    def name(self, step, values):
        self.score = step


class Metrics(dict):
    """Notes evaluations."""

    told = ""

    def say(self, line):
        self.told += line

    def evaluated(self, done, values, pulse):
        self[done] = values


class Batches:
    """An evaluator of so many batches."""

    scores = ("eval/step",)

    def __init__(self, every, count=2):
        self.every, self.count = every, count

    def run(self, model, step):
        for _ in range(self.count):
            model(torch.zeros(1))
        yield "eval/step", float(step)


def keeper(*, evaluators=(), stop=None, steps=10, **options):
    options = {"pulse": Pulse(), "metrics": Metrics(), "start": 0, "steps": steps, **options}
    return Keeper(Engine(), Saver(), evaluators, stop or Stop(), **options)


def leave(keeper, error, writing=False):
    """Make step 6, then fail."""
    with keeper:
        keeper.step(6, False, False, writing)
        raise error


def calls(keeper):
    return [call for call in keeper._saver.calls if call != ("finish",)]


def test_a_save_that_is_due_does_not_hold_up_training_and_the_last_one_does():
    one = keeper()
    assert one.step(3, False, True, False)
    assert one.step(4, False, False, False)
    assert one.step(10, False, False, False)
    assert calls(one) == [("save", 3, False), ("save", 10, True)]


def test_a_background_save_is_finished_when_no_rank_writes_any_more():
    one = keeper()
    one.step(3, False, False, True)
    assert one._saver.calls == []
    one.step(4, False, False, False)
    assert one._saver.calls == [("finish",)]


def test_evaluators_run_at_their_steps_and_at_the_end_after_the_save():
    one = keeper(evaluators=[Batches(4), Batches(None)])
    for done in range(1, 11):
        assert one.step(done, False, done == 8, False)
    assert sorted(one._metrics) == [4, 8, 10]
    assert one._pulse.beats.index((7, "save")) < one._pulse.beats.index((7, "evaluation"))


def test_an_evaluator_that_opens_its_data_is_in_the_evaluation_for_the_watchdog():
    one = keeper(evaluators=[Batches(1, count=0)])
    assert one.step(3, False, True, False)
    assert one._pulse.beats == [(2, "save"), (2, "evaluation")]


def test_a_better_evaluation_has_its_checkpoint_saved_before_it_is_named():
    one = keeper(evaluators=[Batches(1)], best=Best())
    assert one.step(2, False, False, False)
    assert one.step(3, False, False, False)
    assert one.step(4, False, True, False)
    assert calls(one) == [("ensure", 3), ("prune",), ("save", 4, False), ("prune",)]
    assert one._best.score == 4


def test_the_best_stays_the_best_where_a_better_one_cannot_be_saved(monkeypatch):
    one = keeper(evaluators=[Batches(1)], best=Best())

    def fails(done):
        raise SaveError("step 3 could not be saved")

    monkeypatch.setattr(one._saver, "ensure", fails)
    assert one.step(3, False, False, False)
    assert (calls(one), one._best.score) == ([], None)
    assert "step 3 could not be saved; the best of them stays the best" in one._metrics.told


def test_a_run_whose_scores_were_no_numbers_says_at_its_end_that_none_is_the_best():
    one = keeper(evaluators=[Batches(1)], best=Best(), steps=2)
    for done in (1, 2):
        assert (one.step(done, False, False, False), "note:" in one._metrics.told) == (True, done == 2)
    assert "checkpoint.best: no eval/step was a number" in one._metrics.told


def test_a_stop_saves_at_once_and_does_not_evaluate():
    one = keeper(evaluators=[Batches(1)])
    assert not one.step(5, True, False, False)
    assert calls(one) == [("save", 5, True)]
    assert not one._metrics


def test_a_stop_at_the_last_step_is_its_end():
    one = keeper(evaluators=[Batches(1)])
    assert one.step(10, True, False, False)
    assert calls(one) == [("save", 10, True)]
    assert 10 in one._metrics


def test_a_stop_amid_an_evaluation_saves_and_leaves_the_evaluation_to_the_next_start():
    one = keeper(evaluators=[Batches(1, count=3)], stop=Stop(after=2))
    assert not one.step(5, False, False, False)
    assert calls(one) == [("ensure", 5)]
    assert not one._metrics
    assert not list(one._engine.module._forward_pre_hooks)
    again = keeper(evaluators=[Batches(1, count=3)], start=5)
    assert again.evaluate(5)
    assert again._metrics == {5: {"eval/step": 5.0}}


@pytest.mark.parametrize("error", [InputError, StorageError])
def test_steps_made_before_all_ranks_fail_alike_are_saved(error):
    one = keeper()
    with pytest.raises(error):
        leave(one, error("the samples of step 7 cannot be read"))
    assert calls(one) == [("ensure", 6)]


def test_what_one_rank_alone_meets_is_not_saved_as_the_others_would_wait():
    one, error = keeper(), InputError("a damaged chunk")
    error.only_this_rank = True
    with pytest.raises(InputError):
        leave(one, error)
    assert calls(one) == []


@pytest.mark.parametrize("error", [DivergedError("nan"), RollBack(3, 5, "spikes")])
def test_a_save_under_way_is_finished_where_the_guard_ends_the_attempt_and_nothing_else_is_saved(error):
    one = keeper()
    with pytest.raises(type(error)):
        leave(one, error, writing=True)
    assert one._saver.calls == [("finish",)]


def test_a_final_save_that_failed_is_not_tried_again_on_the_way_out():
    one = keeper()
    with pytest.raises(SaveError):
        leave(one, SaveError("no room"), writing=True)
    assert one._saver.calls == []
