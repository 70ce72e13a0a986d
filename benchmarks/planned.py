"""A step's time as `launch/plan.py --measure` has it against that of real steps, on CPU ranks.

    python benchmarks/planned.py [--rounds 2] [--cases ti16x1 ti16x2 b16x1 b16x2]

A case is a network and a number of ranks. `launch/pretrain.py` and the plan take turns: each plan is compared with the
mean of the real runs before and after it, so that a machine that becomes slower or faster meanwhile counts half. The
images are JPEGs of 500×375. A first step, which allocates, is not counted. All cases: about 7 minutes a round on two
cores. Medians and spread; JSON beside them: runs/bench/planned.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from typing import Any

from benchmarks.photos import write_photos
from benchmarks.table import print_table, save, spread
from pretrain.ranks.launcher import free_port

# (architecture, images of a rank, ranks, steps of a run)
CASES = {
    "ti16x1": ("vit_ti_16", 16, 1, 12),
    "ti16x2": ("vit_ti_16", 16, 2, 12),
    "b16x1": ("vit_b_16", 8, 1, 5),
    "b16x2": ("vit_b_16", 8, 2, 5),
}
AIM = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        photos = write_photos(Path(scratch) / "photos", 512)
        for case in args.cases:
            figures[case] = measured(case, args.rounds, photos.shards, Path(scratch))
    rows = []
    for case, rounds in figures.items():
        ratios = [one["ratio"] for one in rounds]
        real = [seconds for one in rounds for seconds in one["real"]]
        rows.append(
            (case, *spread(real, ".3f"), *spread([one["planned"] for one in rounds], ".3f"), *spread(ratios, ".2f"))
        )
    header = (
        "network × ranks",
        "real step, s",
        "low – high",
        "planned, s",
        "low – high",
        "planned ÷ real",
        "low – high",
    )
    print_table("A step as planned after --measure", header, rows)
    save("planned", {"aim": AIM, "cases": figures})


def measured(case: str, rounds: int, shards: Path, scratch: Path) -> list[dict[str, Any]]:
    """Real steps, then in each round a plan and real steps again."""
    found, before = [], real_step(case, shards, scratch)
    for _ in range(rounds):
        planned, after = planned_step(case, shards, scratch), real_step(case, shards, scratch)
        ratio = planned / statistics.mean([before, after])
        print(f"{case}: {planned:.3f} s planned, {before:.3f} and {after:.3f} s real", flush=True)
        found.append({"planned": planned, "real": [before, after], "ratio": ratio})
        before = after
    return found


def config(case: str, shards: Path, scratch: Path) -> Path:
    """The run of a case, under ZeRO 1 as the shipped recipes."""
    arch, images, ranks, steps = CASES[case]
    tree = {
        "name": case,
        "model": {"arch": arch},
        "data": {"train": str(shards), "workers": 1, "crop": "tensorflow"},
        "train": {"global_batch": images * ranks, "micro_batch": images, "steps": steps},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.1},
        "schedule": {"warmup_steps": 1},
        "logging": {"every": 1, "tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }
    path = scratch / f"{case}.json"
    path.write_text(json.dumps(tree))
    return path


def real_step(case: str, shards: Path, scratch: Path) -> float:
    """Median seconds of real steps, without the first."""
    _, images, ranks, _ = CASES[case]
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        port = str(free_port())
        words = [sys.executable, "launch/pretrain.py", "--config", config(case, shards, scratch), "--out", out]
        processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.append(
                subprocess.Popen(words, cwd=ROOT, env=environment(ranks) | place, stdout=subprocess.DEVNULL)
            )
        if any([process.wait() for process in processes]):
            sys.exit(f"{case}: the run failed")
        lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
        rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return images * ranks / statistics.median(rates[1:])


def planned_step(case: str, shards: Path, scratch: Path) -> float:
    """Seconds of a step by the plan."""
    ranks = CASES[case][2]
    words = [sys.executable, "launch/plan.py", "--config", config(case, shards, scratch), "--measure", "--json"]
    words += ["--device", "cpu", "--nodes", "1", "--gpus-per-node", str(ranks), "--gpu-memory", "16"]
    done = subprocess.run(words, cwd=ROOT, env=environment(ranks), stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout)["step_seconds"])


def environment(ranks: int) -> dict[str, str]:
    """One rank takes all cores, several take one each, as launchers set it."""
    threads = {"OMP_NUM_THREADS": "1"} if ranks > 1 else {}
    return {"DS_ACCELERATOR": "cpu", **os.environ, **threads}


if __name__ == "__main__":
    main()
