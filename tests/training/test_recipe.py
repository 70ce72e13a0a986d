"""What a run computes, from its config, its data and the ranks."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.errors import InputError
from pretrain.training.config import RunConfig
from pretrain.training.recipe import Recipe, run_steps

TREE = {
    "name": "tiny",
    "seed": 7,
    "model": {"arch": "vit_ti_16", "num_classes": 5},
    "train": {"global_batch": 12, "micro_batch": 2, "steps": 40},
    "optimizer": {"lr": 0.5},
    "schedule": {"warmup_steps": 4},
}


def config(**changes):
    return RunConfig.model_validate({**TREE, **{key: {**TREE.get(key, {}), **value} for key, value in changes.items()}})


def index(samples=100, one_label=True):
    return SimpleNamespace(samples=samples, one_label=one_label)


def test_a_recipe_is_loss_schedule_averaging_batch_seed_and_precision():
    recipe = Recipe.of(config(), index(), ranks=3)
    assert (recipe.steps, recipe.accumulation, recipe.seed, recipe.dtype) == (40, 2, 7, torch.float32)
    assert [recipe.schedule(step) for step in (0, 2, 4)] == [0.0, 0.25, 0.5]
    assert recipe.averaging(10) == 0.0
    logits, labels = torch.zeros(2, 5), torch.tensor([[1], [2]])
    assert recipe.loss(logits, labels, torch.tensor([True, True])) == pytest.approx(torch.tensor(5.0).log())


def test_the_same_function_on_other_ranks():
    one, three = Recipe.of(config(), index(), ranks=1), Recipe.of(config(), index(), ranks=3)
    assert (one.accumulation, three.accumulation) == (6, 2)
    assert one.schedule == three.schedule
    assert one.averaging == three.averaging


def test_epochs_become_steps():
    epochs = config(train={"steps": None, "epochs": 2.5})
    assert run_steps(epochs, 100) == Recipe.of(epochs, index(), ranks=1).steps == 21
    with pytest.raises(InputError, match=r"train\.epochs: 0\.01 of 100 samples in batches of 12 is no whole step"):
        run_steps(config(train={"steps": None, "epochs": 0.01}), 100)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match="global_batch"):
        Recipe.of(config(), index(), ranks=5)
    with pytest.raises(InputError, match=r"train\.loss: softmax takes exactly one label"):
        Recipe.of(config(), index(one_label=False), ranks=1)
