"""Whether the code as it is trains as another commit does, bit for bit, and whether each resumes the other's runs.

    python benchmarks/unchanged.py --against REV

A small network is trained on two CPU ranks with mixup, RandAugment, dropout, an average of the weights, accumulation,
validation and saves on the way, at every ZeRO stage and in bf16. Compared are the losses, learning rates, gradient
norms and scores of all steps, the samples of each rank, the fingerprints of the last checkpoint, the keys of
config.json, and the same of a run that one commit began and the other ended. The other commit may refuse a run of this
one, by the name of a key that has come since; that is no difference.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
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
            "fingerprints": [last["fingerprints"], last["updates"]],
            "keys": sorted(json.loads((out / "config.json").read_text())),
        }

    def cut(self, run: str, name: str) -> None:
        """Copy a run as if it had been killed after `HALF` steps were saved."""
        shutil.copytree(self.folder / run, self.folder / name)
        for checkpoint in (self.folder / name / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > HALF:
                shutil.rmtree(checkpoint)


def compare(pair: Pair, layout: str, changes: list[str]) -> bool:
    """Print what differs in a layout; whether nothing does."""
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
    for name, found in results.items():
        differing = [what for what in whole if found[what] != whole[what]]
        print(f"{layout:14}  {name:22}  {'differs: ' + ', '.join(differing) if differing else 'equal'}", flush=True)
    return all(found == whole for found in results.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", required=True, help="the commit to compare with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        old, runs = Path(name) / "tree", Path(name) / "runs"
        runs.mkdir()
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), args.against], check=True)
        try:
            pair = Pair(old, runs)
            equal = [compare(pair, layout, changes) for layout, changes in LAYOUTS.items()]
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
