"""Whether the code as it is trains as another commit does, bit for bit, and whether each resumes the other's runs.

    python benchmarks/unchanged.py --against REV [--tolerance R] [key.path=value …]

A small network is trained on two CPU ranks with mixup, RandAugment, dropout, an average of the weights, accumulation,
validation and saves on the way, at every ZeRO stage and in bf16. Compared are the losses, learning rates, gradient
norms and scores of all steps, the samples of each rank, the fingerprints of the last checkpoint, the keys of
config.json, and the same of a run that one commit began and the other ended. The other commit may refuse a run of this
one, by the name of a key that has come since; that is no difference.

--tolerance R is for a change that rounds differently: losses and gradient norms may differ by R of their value,
and the fingerprints, which any rounding changes, are not compared. Said is how many of the numbers are equal to the
bit, and by how much the others differ at most, in which step. Accuracies move by whole images as soon as anything is
rounded otherwise: how far is said too, and not judged. Samples, steps and learning rates must be equal all the same.
A change of what is drawn for dropout gives other masks, which no tolerance spans: compare with model.dropout=0.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from pretrain.ranks.launcher import free_port

CONFIG: dict[str, Any] = {
    "name": "unchanged",
    "seed": 3,
    "model": {
        "patch_size": 4, "layers": 3, "width": 48, "mlp": 96, "heads": 4, "image_size": 16, "channels": 1,
        "num_classes": 10, "representation_size": 32, "dropout": 0.1,
    },
    "data": {"workers": 2, "mixup": 0.2, "randaugment": [2, 10], "audit": True},
    "train": {"global_batch": 24, "micro_batch": 6, "steps": 24, "loss": "sigmoid", "eval_every": 8},
    "optimizer": {"lr": 0.001, "weight_decay": 0.1, "averaging": {"decay": 0.99}},
    "schedule": {"warmup_steps": 5},
    "checkpoint": {"every": 8, "keep": 9},
    "logging": {"every": 1, "tensorboard": False},
}  # fmt: skip
HALF, STEPS = 8, CONFIG["train"]["steps"]
LAYOUTS = {
    "fp32, ZeRO 0": [],
    "fp32, ZeRO 1": ["deepspeed.zero_optimization.stage=1"],
    "bf16, ZeRO 2": ["deepspeed.zero_optimization.stage=2", "deepspeed.bf16.enabled=true"],
    "fp32, ZeRO 3": ["deepspeed.zero_optimization.stage=3"],
}
COMPARED = ("step", "images", "epoch", "loss", "lr", "grad_norm")
EXACT = ("step", "images", "epoch", "lr")  # no arithmetic of the network is in them


class RefusedError(Exception):
    """A command refused its input, with one message."""


class Pair:
    """The two trees, old and new, and the runs that both make under `folder`."""

    def __init__(self, old: Path, folder: Path) -> None:
        self.trees, self.folder = {"old": old, "new": ROOT}, folder
        for split in ("train", "test"):
            self.command("old", "launch/shards.py", "build", "digits", str(folder / split), "--split", split)
        data = {**CONFIG["data"], "train": str(folder / "train"), "eval": str(folder / "test")}
        (folder / "config.json").write_text(json.dumps({**CONFIG, "data": data}))

    def command(self, tree: str, *words: str, ranks: int = 0) -> None:
        """Run a script of a tree, as so many ranks if any."""
        torchrun = [str(Path(sys.executable).with_name("torchrun")), f"--nproc_per_node={ranks}"]
        start = [*torchrun, f"--master_port={free_port()}"] if ranks else [sys.executable]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*start, *words], cwd=self.trees[tree], env=env, capture_output=True, text=True)
        refusals = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        # Commits before ViTSpec.recorded end with a traceback where a checkpoint has a field that they do not know.
        refusals += re.findall(r"TypeError: .*unexpected keyword argument.*", done.stderr)
        if done.returncode and refusals:
            raise RefusedError(refusals[0])
        if done.returncode:
            raise SystemExit(f"{tree}: {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")

    def train(self, tree: str, run: str, changes: list[str]) -> dict[str, Any]:
        """Train a run, anew or on from what it holds; what is compared of it."""
        config, out = str(self.folder / "config.json"), self.folder / run
        self.command(tree, "launch/pretrain.py", "--config", config, "--out", str(out), *changes, ranks=2)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        last = json.loads((out / f"checkpoints/step_{STEPS:08d}/state.json").read_text())
        return {
            "steps": [{k: v for k, v in line.items() if k in COMPARED or "eval/" in k} for line in lines],
            "samples": [path.read_text() for path in sorted((out / "audit").glob("rank_?????.jsonl"))],
            "fingerprints": last["fingerprints"],
            "updates": last["updates"],
            "keys": sorted(json.loads((out / "config.json").read_text())),
        }

    def cut(self, run: str, name: str) -> None:
        """Copy a run as if it had been killed after `HALF` steps were saved."""
        shutil.copytree(self.folder / run, self.folder / name)
        for checkpoint in (self.folder / name / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > HALF:
                shutil.rmtree(checkpoint)


@dataclass(frozen=True)
class Drift:
    """How far the numbers of one run's lines are from those of another's, as shares of the larger of two values."""

    numbers: int
    equal: int  # to the bit
    most: float
    where: str  # the number that differs most: its key and step
    accuracy: float  # the largest difference of two accuracies, from 0 to 1

    def text(self) -> str:
        """How many are equal, and how far the others are off."""
        if self.equal == self.numbers:
            return f"all {self.numbers} numbers bit-equal"
        return (
            f"{self.equal} of {self.numbers} numbers bit-equal, losses and norms within {self.most:.1e} "
            f"({self.where}), accuracies within {self.accuracy:.2%}"
        )


def drift(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Drift | None:
    """Of metrics lines; None where they are not of the same steps, keys and exact values."""
    if [(sorted(line), [line.get(key) for key in EXACT]) for line in old] != [
        (sorted(line), [line.get(key) for key in EXACT]) for line in new
    ]:
        return None
    pairs = [
        (key, line["step"], line[key], other[key])
        for line, other in zip(old, new, strict=True)
        for key in line
        if key not in EXACT
    ]
    most, where = max(
        (_apart(first, second), f"{key} of step {step}") for key, step, first, second in pairs if not _counted(key)
    )
    accuracy = max((abs(first - second) for key, _, first, second in pairs if _counted(key)), default=0.0)
    return Drift(len(pairs), sum(first == second for *_, first, second in pairs), most, where, accuracy)


def _counted(key: str) -> bool:
    """Whether a score is a share of the images."""
    return "eval/top" in key


def _apart(first: float | None, second: float | None) -> float:
    """The difference of two numbers as a share of the larger; infinite where one is missing or not finite."""
    if first == second:
        return 0.0
    if first is None or second is None or not (math.isfinite(first) and math.isfinite(second)):
        return math.inf
    return abs(first - second) / max(abs(first), abs(second))


def compare(pair: Pair, layout: str, changes: list[str], tolerance: float) -> bool:
    """Print what differs in a layout; whether nothing does by more than `tolerance`."""
    number = list(LAYOUTS).index(layout)
    whole = pair.train("old", f"old{number}", changes)
    results = {"new run": pair.train("new", f"new{number}", changes)}
    for begins, ends in (("old", "new"), ("new", "old")):
        pair.cut(f"{begins}{number}", f"{begins}-{ends}{number}")
        try:
            results[f"{begins} run resumed by {ends}"] = pair.train(ends, f"{begins}-{ends}{number}", changes)
        except RefusedError as refusal:  # the old commit does not know a key that has come since
            print(f"{layout:14}  {begins} run resumed by {ends}  refused: {refusal}", flush=True)
            if ends == "new":
                return False
    right = True
    for name, found in results.items():
        differing = [what for what in whole if what != "steps" and found[what] != whole[what]]
        if tolerance and "fingerprints" in differing:
            differing.remove("fingerprints")
        apart = drift(whole["steps"], found["steps"])
        if apart is None or apart.most > tolerance or (apart.accuracy and not tolerance):
            differing.insert(0, "steps")
        said = f"differs: {', '.join(differing)}" if differing else "within the tolerance" if tolerance else "equal"
        print(f"{layout:14}  {name:22}  {said}; {apart.text() if apart else 'not the same lines'}", flush=True)
        right = right and not differing
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", required=True, help="the commit to compare with")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="R", help="share by which numbers may differ; 0: to the bit"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="laid over the config of all runs")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        old, runs = Path(name) / "tree", Path(name) / "runs"
        runs.mkdir()
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), args.against], check=True)
        try:
            pair = Pair(old, runs)
            equal = [
                compare(pair, layout, [*changes, *args.overrides], args.tolerance)
                for layout, changes in LAYOUTS.items()
            ]
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
