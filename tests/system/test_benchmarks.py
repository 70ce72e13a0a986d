"""The benchmarks at toy size: every contender computes the same network, is timed, and the figures are written."""

import json
import sys

import pytest
import torch

from benchmarks import loop, step
from pretrain.configfile import read_config
from pretrain.engine import processgroup
from pretrain.model.spec import ViTSpec
from pretrain.training.config import RunConfig

SPEC = ViTSpec(patch_size=8, layers=2, width=48, mlp=96, heads=3, image_size=16, num_classes=7)
CPU = torch.device("cpu")


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Results go into a folder of the test's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/toy.py"])
    return tmp_path


def test_the_contenders_are_one_network_and_all_are_timed(in_folder):
    contenders = step.build(SPEC, CPU, torch.float32, compiled=False)
    assert {"vit-foundry", "timm", "torchvision", "Hugging Face", "literal"} <= contenders.keys()
    step.check(contenders, SPEC, CPU, torch.float32)
    same = [contender.parameters for contender in contenders.values() if not contender.differs]
    assert len(set(same)) == 1
    found = step.measure(contenders, SPEC, 2, rounds=2)
    step.report("toy", "toy", {}, contenders, found, SPEC, 2)
    told = json.loads((in_folder / "runs/bench/toy.json").read_text())
    assert all(len(told["step"]["measured"][name]) == 2 for name in contenders)
    assert (in_folder / "runs/bench/toy.png").stat().st_size > 1000


def test_a_contender_of_another_function_ends_the_benchmark():
    contenders = step.build(SPEC, CPU, torch.float32, compiled=False)
    with torch.no_grad():
        contenders["literal"].network.norm.weight = torch.nn.Parameter(torch.full((SPEC.width,), 1.01))
    with pytest.raises(SystemExit, match=r"literal: .* its logits differ"):
        step.check(contenders, SPEC, CPU, torch.float32)


def test_the_best_peer_is_the_one_of_the_least_median():
    found = {
        name: [step.Measured(seconds, 1.0) for seconds in values]
        for name, values in {step.OURS: (2, 4, 2), "one": (3, 3, 3), "other": (1, 8, 9)}.items()
    }
    assert step.best_peer(found) == ("one", [1.5, 0.75, 1.5])


def test_the_loop_is_the_trainer_with_batches_in_turns(in_folder, tiny_config):
    steps = loop.steps(2, 1)
    path = tiny_config(in_folder / "tiny.json", train={"global_batch": 24, "steps": steps}, data={"audit": True})
    out = in_folder / "run"
    found = loop.compare(read_config(RunConfig, path, []), out, processgroup.start(), rounds=2, block=1)
    assert {way: len(values) for way, values in found.seconds.items()} == dict.fromkeys(found.seconds, 2)
    assert all(seconds > 0 for values in found.seconds.values() for seconds in values)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == steps
    # What each step was trained on: the cached batch once more in the two steps of each of three blocks and in the
    # last, new samples in all others.
    trained = [tuple(json.loads(line)["ids"]) for line in (out / "audit/rank_00000.jsonl").read_text().splitlines()]
    cached = max(trained, key=trained.count)
    assert trained.count(cached) == 7
    assert len(set(trained)) == steps - 6
