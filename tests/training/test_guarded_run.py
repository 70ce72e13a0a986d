"""A run whose losses or gradients stop being numbers: skipped updates, inspection, the end, the way back."""

import json
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import folder as checkpoints
from pretrain.checkpoint.step import Checkpoint
from pretrain.history.history import RunHistory
from pretrain.history.hours import hours
from pretrain.index.index import Index
from pretrain.stream.order import Order
from pretrain.weights.load import load_weights

STEPS, BATCH = 12, 8
# test_poisoned.py holds the weights against every stage and precision; here is what the run makes of it.
GRADIENTS = {
    "gradients0": ["deepspeed.zero_optimization.stage=0"],
    "gradients1_bf16": ["deepspeed.zero_optimization.stage=1", "deepspeed.bf16.enabled=true"],
    "gradients2": ["deepspeed.zero_optimization.stage=2"],
    "gradients3_bf16": ["deepspeed.zero_optimization.stage=3", "deepspeed.bf16.enabled=true"],
}
SPIKED = {"spiked": [], "spiked_bf16": ["deepspeed.bf16.enabled=true"]}


@pytest.fixture(scope="module")
def runs(tiny_config, ranks, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    config = tiny_config(
        folder / "guarded.json",
        model={"width": 16, "mlp": 32, "heads": 2, "image_size": 16},
        train={"global_batch": BATCH, "steps": STEPS, "guard": {"skips": 2, "margin": 2}},
        schedule={"warmup_steps": 0},
        checkpoint={"every": 3, "keep": 10},
    )
    variants = {
        "once": {"changes": ["deepspeed.zero_optimization.stage=1"], "losses": [6]},
        "end": {"changes": [], "losses": [4, 7, 8]},
        "back": {"changes": ["train.guard.then=rollback", "deepspeed.zero_optimization.stage=2"], "losses": [7, 8]},
        "late": {"changes": ["train.guard.then=rollback", "train.guard.margin=100"], "losses": [7, 8]},
        "evaluated": {"changes": [], "refuses": [6, STEPS]},
        "unsaved": {"changes": ["checkpoint.every=null"], "refuses": [3, 9]},
        "outage": {"changes": ["checkpoint.every=null"], "refuses": [3, 9], "passing": True},
        "half": {
            "changes": [
                "deepspeed.zero_optimization.stage=2", "deepspeed.fp16.enabled=true",
                "deepspeed.fp16.initial_scale_power=1", "deepspeed.fp16.hysteresis=1",
            ],
            "gradients": list(range(4, STEPS)),
        },
        "averaged": {
            "changes": ['optimizer.averaging={"decay":0.9}', "checkpoint.every=1", "train.steps=3"], "losses": [0],
        },
        "nowhere": {"changes": ["train.guard.then=rollback"], "losses": [0, 1]},
    }  # fmt: skip
    for name, half in SPIKED.items():  # under ZeRO 3 the network has copies of the weights that outlive a step
        changes = ["deepspeed.zero_optimization.stage=3", "train.guard.then=rollback", "train.guard.spike=50"]
        variants[name] = {"changes": [*changes, *half], "spikes": [7, 8]}
    for name, changes in GRADIENTS.items():
        variants[name] = {"changes": changes, "gradients": [6]}
    ranks(2, Path(__file__).parent / "guarded.py", config, folder, json.dumps(variants))
    return folder


def lines(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def events(run: Path) -> list[tuple[str, int]]:
    """Those of steps, starts and ends; how saves fall among them is a question of speed."""
    return [(line["event"], line["step"]) for line in lines(run, "events.jsonl") if line["event"] != "saved"]


def state(run: Path, step: int = STEPS) -> dict:
    return Checkpoint.read(run / "checkpoints" / f"step_{step:08d}").state


@pytest.mark.parametrize("name", ["once", *GRADIENTS])
def test_the_update_is_skipped_and_the_run_goes_on(runs, name):
    told = lines(runs / name)
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    assert told[-1]["updates_skipped"] == 1
    assert "updates_skipped" not in told[5]
    assert state(runs / name)["updates"] == STEPS - 1
    assert (told[6]["loss"] is None) == (name == "once")
    assert all(line["loss"] is not None for line in told[7:])
    # Nothing changed with that step: what is kept for inspection is what had been saved before it.
    kept = Checkpoint.read(runs / name / "inspection" / "step_00000006")
    assert kept.state["fingerprints"] == state(runs / name, 6)["fingerprints"]
    assert load_weights(kept.path).sha256 == load_weights(runs / name / "checkpoints" / "step_00000006").sha256


def test_a_skipped_first_update_gives_the_start_no_share_of_the_average(runs):
    second, third = (load_weights(runs / f"averaged/checkpoints/step_{step:08d}").tensors for step in (2, 3))
    for name, average in load_weights(runs / "averaged", averaged=True).tensors.items():
        by_hand = (0.9 * second[name].double() + third[name].double()) / 1.9
        assert torch.allclose(average.double(), by_hand, rtol=0, atol=1e-7), name


def test_the_batch_is_kept_for_inspection(runs, digits):
    index = Index.open(str(digits / "train"))
    order = Order(index.samples, BATCH, 0, 8, None)
    batches = [json.loads(file.read_text()) for file in sorted((runs / "once" / "inspection").glob("*/batch_*.json"))]
    assert [batch["step"] for batch in batches] == [6, 6]
    assert [id for batch in batches for id in batch["ids"]] == order.ids(6).tolist()
    assert [batch["loss"] == "nan" for batch in batches] == [False, True]


def test_too_many_in_a_row_end_the_run_on_all_ranks_with_whole_checkpoints(runs):
    said = {(runs / f"end.{rank}.diverged").read_text() for rank in range(2)}
    assert len(said) == 1
    assert "step 9: the loss is nan" in said.pop()
    assert checkpoints.newest(runs / "end" / "checkpoints")[0].step == 6
    assert [line["step"] for line in lines(runs / "end")] == list(range(1, 10))
    skipped = [("skipped", step) for step in (5, 8, 9)]
    assert events(runs / "end") == [("start", 0), ("train", 0), *skipped, ("left", 8), ("failed", 8)]
    assert lines(runs / "end", "events.jsonl")[-1]["reason"].startswith("DivergedError: step 9: the loss is nan")


def test_a_roll_back_avoids_the_steps_and_tells_one_history(runs):
    told = lines(runs / "back")
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    final = state(runs / "back")
    assert final["guard"]["avoided"] == [[5, 8]]
    assert final["updates"] == STEPS - 4
    assert [line["step"] for line in lines(runs / "back", "metrics.discarded.jsonl")] == [4, 5, 6, 7, 8, 9]
    assert all(line["loss"] is not None for line in told[9:])
    skipped, avoided = ([("skipped", step) for step in steps] for steps in ((8, 9), (6, 7, 8, 9)))
    back = [*skipped, ("left", 8), ("rollback", 5), ("train", 3), *avoided]
    assert events(runs / "back") == [("start", 0), ("train", 0), *back, ("left", STEPS), ("finished", STEPS)]


def test_the_time_of_steps_that_a_roll_back_repeats_is_lost(runs):
    [attempt] = hours(RunHistory.read(runs / "back")).attempts
    again = lines(runs / "back", "metrics.discarded.jsonl")
    first = next(line for line in lines(runs / "back", "events.jsonl") if line["event"] == "left")
    lost = sum(line["time/training"] + line["time/waiting"] for line in [*again, first])
    assert attempt.seconds["lost"] == pytest.approx(lost, abs=0.01)
    assert attempt.seconds["training"] > 0
    assert sum(attempt.seconds.values()) == pytest.approx(attempt.wall, abs=0.01)
    assert abs(attempt.seconds["other"]) <= 0.01 * attempt.wall


@pytest.mark.parametrize("name", SPIKED)
def test_after_spikes_a_run_goes_on_with_exactly_the_weights_it_went_back_to(runs, name):
    told, discarded = lines(runs / name), lines(runs / name, "metrics.discarded.jsonl")
    assert [line["step"] for line in discarded] == [4, 5, 6, 7, 8, 9]
    assert min(line["loss"] for line in discarded[-2:]) > 100 * max(line["loss"] for line in discarded[:-2])
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    assert state(runs / name)["guard"]["avoided"] == [[5, 8]]
    # The same steps from the same weights: what had been trained since is in none of the network's copies.
    for again, first in zip(told[3:6], discarded[:3], strict=True):
        assert {key: again[key] for key in ("step", "loss", "grad_norm", "lr")} == {
            key: first[key] for key in ("step", "loss", "grad_norm", "lr")
        }


def test_without_a_checkpoint_to_go_back_to_the_run_ends(runs):
    assert "no checkpoint to go back to" in (runs / "nowhere.0.diverged").read_text()
    assert [event for event, _ in events(runs / "nowhere")][-3:] == ["left", "rollback", "failed"]


def test_a_roll_back_that_no_checkpoint_is_early_enough_for_takes_the_oldest(runs):
    final = state(runs / "late")
    assert final["guard"]["avoided"] == [[0, 8]]
    assert final["updates"] == 3 + (STEPS - 9), "from step 3 on, the oldest, and without the steps up to 9"


def test_what_is_being_saved_is_whole_when_an_evaluation_ends_the_run(runs):
    for rank in range(2):
        assert [(runs / f"evaluated.{rank}.{n}.refused").read_text() for n in range(2)] == ["6", str(STEPS)]


@pytest.mark.parametrize("name", ["unsaved", "outage"])
def test_an_evaluation_that_ends_the_run_costs_no_step(runs, name):
    for rank in range(2):
        assert [(runs / f"{name}.{rank}.{n}.refused").read_text() for n in range(2)] == ["3", "9"]
    ended = {"unsaved": "failed", "outage": "stopped"}[name]
    ends = [(event, step) for event, step in events(runs / name) if event in ("failed", "stopped", "finished")]
    assert ends == [(ended, 3), (ended, 9), ("finished", STEPS)]


@pytest.mark.parametrize("name", ["evaluated", "unsaved", "outage"])
def test_an_evaluation_that_was_not_made_is_made_when_the_run_goes_on_or_is_started_again(runs, name):
    assert [line["step"] for line in lines(runs / name) if "eval/step" in line] == [3, 6, 9, 12]
    assert [json.loads((runs / f"{name}.{rank}.made").read_text()) for rank in range(2)] == [[3, 6, 9, 12]] * 2


def test_overflows_that_the_loss_scale_cannot_answer_end_the_run_like_others(runs):
    said = (runs / "half.0.diverged").read_text()
    assert said.startswith("step 7: the gradient norm is "), said
    assert "2 updates in a row were skipped, from step 6 on" in said, "the first took the scale from 2 to 1"
    assert checkpoints.newest(runs / "half" / "checkpoints")[0].step == 6
