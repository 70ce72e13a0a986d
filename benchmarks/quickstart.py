"""How far the quick start's scores depend on the training seed and on the processor's kernels.

    python benchmarks/quickstart.py [--seeds 0,1,2,3,4] [--ranks 2]

Pre-trains, fine-tunes and probes as `make quickstart` does, once for each training seed and each set of kernels: plain
ones, AVX2, and AVX2 without oneDNN. The same seed on other kernels sums in another order, which training amplifies. The
draws of the support images are the same in all. A score in %, its lowest and highest are over training seeds; the last
columns count how often the network's leading feature beats pixels. Run it after `make quickstart`, which makes the
shards; what is finished is not run again. Folders: runs/bench/quickstart/; JSON: runs/bench/quickstart.json.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import subprocess
from statistics import fmean, stdev

from benchmarks.table import print_table, save

FOLDER = Path("runs/bench/quickstart")
# oneDNN computes the patch embedding, MKL the other products where torch comes with it, ATen all else.
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
KERNELS = {"plain": (PLAIN, True), "avx2": (AVX2, True), "avx2, no oneDNN": (AVX2, False)}
# As torchrun's script: takes oneDNN out, if it is told so, and runs the script named next.
STARTER = """
import runpy, sys, torch
torch.backends.mkldnn.set_flags(sys.argv[1] == "True")
del sys.argv[:2]
sys.path.insert(0, "launch")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SHOTS = (1, 5, 10, 25)


def quickstart(out: Path, seed: int, ranks: int, variables: dict[str, str], onednn: bool) -> dict[str, float]:
    """Scores in % by name, and the last line of fine-tuning's metrics, of one quick start in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    starter = FOLDER / "starter.py"
    starter.write_text(STARTER)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(starter), str(onednn)]
    for command in (
        ["launch/pretrain.py", "--config", "quickstart/pretrain.json", "--out", f"{out}/pretrain", f"seed={seed}"],
        [
            "launch/finetune.py", "--config", "quickstart/finetune.json", "--init", f"{out}/pretrain",
            "--out", f"{out}/finetune", f"seed={seed}",
        ],
        [
            "launch/fewshot.py", "--config", "quickstart/fewshot.json", "--init", f"{out}/pretrain",
            "--out", f"{out}/fewshot",
        ],
    ):  # fmt: skip
        environment = {**os.environ, **variables, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        with (out / "console.txt").open("a") as console:
            subprocess.run(
                [sys.executable, *launcher, *command], env=environment, check=True, stdout=console, stderr=console
            )
    report = json.loads((out / "fewshot/report/report.json").read_text())
    scores = {f"{row['features']} {row['probe']} {row['shots']}": 100 * row["mean"] for row in report["summary"]}
    lines = map(json.loads, (out / "finetune/metrics.jsonl").read_text().splitlines())
    return {**scores, "finetuned": 100 * [line["eval/top1"] for line in lines if "eval/top1" in line][-1]}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2, 3, 4])
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()

    config = json.loads(Path("configs/quickstart/fewshot.json").read_text())["fewshot"]
    features, probes = config["features"], config["probes"]
    found: dict[str, dict[int, dict[str, float]]] = {kernels: {} for kernels in KERNELS}
    for seed in args.seeds:
        for kernels, (variables, onednn) in KERNELS.items():
            out = FOLDER / f"{kernels.replace(', ', '-').replace(' ', '-')}-{seed}"
            found[kernels][seed] = scores = quickstart(out, seed, args.ranks, variables, onednn)
            ahead = scores[f"{features[0]} {probes[0]} 5"] - scores[f"pixels {probes[0]} 5"]
            print(f"{out}: 5-shot {ahead:+.1f} points ahead of pixels", flush=True)

    runs = [scores for by_seed in found.values() for scores in by_seed.values()]
    rows = []
    for probe in probes:
        for feature in features:
            cells = [cell([run[f"{feature} {probe} {shots}"] for run in runs]) for shots in SHOTS]
            least = [min(run[f"{feature} {probe} {k}"] - run[f"pixels {probe} {k}"] for run in runs) for k in SHOTS]
            margin = "" if feature in ("pixels", "untrained") else f"{least[1]:+.1f}"
            rows.append([probe, feature, *cells, margin])
    print_table(
        f"{len(runs)} quick starts: accuracy in %, mean ± std (lowest – highest)",
        ["probe", "features", *(f"{shots}-shot" for shots in SHOTS), "least ahead of pixels, 5-shot"],
        rows,
        names=2,
    )
    lead = f"{features[0]} {probes[0]} 5"
    pixels = runs[0][f"pixels {probes[0]} 5"]
    print_table(
        f"{features[0]}, {probes[0]}, 5-shot by kernels and training seed; pixels {pixels:.1f}",
        ["kernels", *map(str, args.seeds), "fine-tuned, mean ± std (lowest – highest)"],
        [
            [
                kernels,
                *(f"{run[lead]:.1f}" for run in by_seed.values()),
                cell([r["finetuned"] for r in by_seed.values()]),
            ]
            for kernels, by_seed in found.items()
        ],
    )
    save("quickstart", {"runs": found})


def cell(values: list[float]) -> str:
    """Mean ± sample standard deviation (lowest – highest)."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.1f} ± {deviation:.1f} ({min(values):.1f} – {max(values):.1f})"


if __name__ == "__main__":
    main()
