"""The whole path on real data, against a plain loop: Fashion-MNIST's 60,000 images, three seeds.

    python benchmarks/fashion.py [--seeds 0,1,2] [--steps 2000] [--tuning 500] [--threads 1]

A small ViT is pre-trained at 20 px (AdamW), its class token probed on digits it has never seen (MNIST, 5 shots, the
ridge), and fine-tuned at 28 px (SGD, a new head of zeros). Here: this project's commands, on one rank, from shards.
There: benchmarks/plain.py, timm's network in a loop of plain PyTorch, from arrays in memory. Both have the same
initialisation scheme, images, batches' size, steps, hyper-parameters, augmentation and evaluation; one decode thread
or worker; their random draws differ. The two take turns, seed by seed. The digits are probed by the same command; this
project's few-shot protocol resizes them as TensorFlow does, the plain loop as torchvision, so both are also compared on
the latter's pixels.

Folders: runs/bench/fashion/; JSON: runs/bench/fashion.json. What is finished is not run again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import json
import subprocess
import tarfile
import time
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.plain import features
from benchmarks.table import print_table, save
from pretrain.index.index import Index
from pretrain.model.vit import VisionTransformer, load_tensors
from pretrain.weights.load import load_weights

FOLDER = Path("runs/bench/fashion")
SETS = {"train": ("fashion-mnist", "train"), "test": ("fashion-mnist", "test"),
        "support": ("mnist5k", "train"), "query": ("mnist5k", "val")}  # fmt: skip
LAYERS, WIDTH, HEADS, PATCH, CLASSES = 4, 64, 4, 4, 10
AREA = (0.5, 1.0)
PRETRAIN = {"size": 20, "batch": 128, "lr": 2e-3, "weight_decay": 0.1, "warmup": 100, "decay": "linear"}
FINETUNE = {"size": 28, "batch": 128, "lr": 0.03, "warmup": 50, "decay": "cosine"}
SCORES = {
    "pretrain": "pre-trained, top-1 at 20 px",
    "fewshot": "MNIST, 5-shot ridge",
    "same pixels": "… both on torchvision's pixels",
    "finetune": "fine-tuned, top-1 at 28 px",
}


def main() -> None:
    args = parse()
    shards = {name: build(name) for name in SETS}
    arrays = {name: unpack(name, folder) for name, folder in shards.items()}
    home = FOLDER / f"{args.steps}-{args.tuning}-{args.threads}"
    home.mkdir(parents=True, exist_ok=True)
    configs(home, shards, args)
    found: dict[str, list[dict[str, float]]] = {"vit-foundry": [], "timm + PyTorch": []}
    for seed in args.seeds:
        for name in list(found)[:: 1 if seed % 2 == 0 else -1]:
            found[name].append(
                ours(home, seed, arrays, args) if name == "vit-foundry" else plain(home, seed, arrays, args)
            )
    report(args, found)


def build(name: str) -> Path:
    """The shards of a set."""
    folder, (source, split) = FOLDER / "shards" / name, SETS[name]
    command(FOLDER, None, "launch/shards.py", "build", source, folder, "--split", split)
    return folder


def unpack(name: str, folder: Path) -> Path:
    """The images of the shards as one array, in the order of their canonical ids."""
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        images, labels = [], []
        for shard in Index.open(str(folder)).shards:
            with tarfile.open(shard.url) as tar:
                for member in tar.getmembers():
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".cls"):
                        labels.append(int(data))
                    else:
                        images.append(np.asarray(Image.open(io.BytesIO(data))))
        np.savez(path, images=np.stack(images), labels=np.array(labels))
    return path


def configs(home: Path, shards: dict[str, Path], args: argparse.Namespace) -> None:
    """The two configs, and the probes'."""
    data = {"train": str(shards["train"]), "eval": str(shards["test"]), "crop_area": AREA, "workers": 1}
    logging = {"tensorboard": False, "every": 100}
    sizes = {"patch_size": PATCH, "layers": LAYERS, "width": WIDTH, "mlp": 4 * WIDTH, "heads": HEADS, "channels": 1}
    one = {
        "name": "pretrain", "data": data, "logging": logging,
        "model": {**sizes, "image_size": PRETRAIN["size"], "num_classes": CLASSES},
        "train": {"global_batch": PRETRAIN["batch"], "steps": args.steps},
        "optimizer": {"lr": PRETRAIN["lr"], "weight_decay": PRETRAIN["weight_decay"], "clip_norm": 1.0},
        "schedule": {"warmup_steps": PRETRAIN["warmup"], "decay": PRETRAIN["decay"]},
    }  # fmt: skip
    two = {
        "name": "finetune", "data": data, "logging": logging,
        "model": {"image_size": FINETUNE["size"], "num_classes": CLASSES},
        "train": {"global_batch": FINETUNE["batch"], "steps": args.tuning},
        "optimizer": {"name": "sgd", "lr": FINETUNE["lr"], "momentum": 0.9, "clip_norm": 1.0},
        "schedule": {"warmup_steps": FINETUNE["warmup"], "decay": FINETUNE["decay"]},
    }  # fmt: skip
    probes = {
        "name": "fewshot",
        "data": {"support": str(shards["support"]), "query": str(shards["query"]), "workers": 1},
        "fewshot": {"shots": [5], "seeds": list(range(10)), "probes": ["ridge"], "features": ["cls"], "oracle": False},
    }
    for config in (one, two, probes):
        (home / f"{config['name']}.json").write_text(json.dumps(config))


def ours(home: Path, seed: int, arrays: dict[str, Path], args: argparse.Namespace) -> dict[str, float]:
    """Scores and seconds of this project's commands."""
    results: dict[str, float] = {}
    first = home / f"pretrain_{seed}"
    for stage, out, init in (("pretrain", first, []), ("finetune", home / f"finetune_{seed}", ["--init", first])):
        told = out / "seconds.json"
        if not told.exists():
            words = ["--config", home / f"{stage}.json", "--out", out, f"seed={seed}", *init]
            seconds = command(home, args.threads, f"launch/{stage}.py", *words)
            told.write_text(json.dumps(seconds))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        results[stage] = next(line["eval/top1"] for line in reversed(lines) if "eval/top1" in line)
        results[f"{stage} command"] = json.loads(told.read_text())
        results[f"{stage} steps"] = sum(line.get("time/training", 0) + line.get("time/waiting", 0) for line in lines)
    out = home / f"fewshot_{seed}"
    command(home, args.threads, "launch/fewshot.py", "--config", home / "fewshot.json", "--init", first, "--out", out)
    digits = home / f"pretrain_{seed}.npz"
    weights = load_weights(first)
    network = VisionTransformer(weights.spec).eval()
    load_tensors(network, weights.tensors)
    with torch.no_grad():
        of_images = {name: str(arrays[name]) for name in ("support", "query")}
        features(lambda images: network(images, features=True)["cls"], {**of_images, "out": str(digits)}, 20)
    return {**results, "fewshot": shot(out), "same pixels": probe(home, digits, f"same_{seed}", args)}


def plain(home: Path, seed: int, arrays: dict[str, Path], args: argparse.Namespace) -> dict[str, float]:
    """Scores and seconds of the plain loop."""
    out, digits = home / f"plain_{seed}.json", home / f"plain_{seed}.npz"
    shared = {"train": str(arrays["train"]), "test": str(arrays["test"]), "crop_area": AREA, "workers": 1}
    sizes = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "num_classes": CLASSES}
    task = {
        "seed": seed, "out": str(out), "network": sizes,
        "pretrain": {**shared, **PRETRAIN, "steps": args.steps},
        "finetune": {**shared, **FINETUNE, "steps": args.tuning},
        "features": {"support": str(arrays["support"]), "query": str(arrays["query"]), "out": str(digits)},
    }  # fmt: skip
    if not out.exists():
        told = home / f"plain_{seed}_task.json"
        told.write_text(json.dumps(task))
        command(home, args.threads, "benchmarks/plain.py", told)
    found: dict[str, Any] = json.loads(out.read_text())
    probed = probe(home, digits, f"plain_fewshot_{seed}", args)
    return {
        **{stage: found[stage]["top1"] for stage in ("pretrain", "finetune")},
        **{f"{stage} steps": found[stage]["seconds"] for stage in ("pretrain", "finetune")},
        "fewshot": probed,
        "same pixels": probed,
        "whole": found["seconds"],
    }


def probe(home: Path, digits: Path, name: str, args: argparse.Namespace) -> float:
    """The 5-shot score of the features in a file."""
    words = ["--features", digits, "--shots", 5, "--seeds", ",".join(map(str, range(10))), "--out", home / name]
    command(home, args.threads, "launch/fewshot.py", *words, 'fewshot.probes=["ridge"]')
    return shot(home / name)


def command(home: Path, threads: int | None, *words: object) -> float:
    """Run a script to its end; its seconds."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(" ".join(map(str, words)), flush=True)
    began, env = time.perf_counter(), {**os.environ, "DS_ACCELERATOR": "cpu"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    with (home / "console.txt").open("a") as console:
        subprocess.run([sys.executable, *map(str, words)], stdout=console, stderr=console, env=env, check=True)
    return time.perf_counter() - began


def shot(out: Path) -> float:
    """The mean accuracy of the ridge over the draws."""
    rows = json.loads((out / "report/report.json").read_text())["summary"]
    return next(float(row["mean"]) for row in rows if row["probe"] == "ridge" and row["shots"] == 5)


def report(args: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    rows = []
    for key, title in SCORES.items():
        for name, results in found.items():
            values = [100 * result[key] for result in results]
            spread = f"{stdev(values):.2f}" if len(values) > 1 else ""
            rows.append([title, name, f"{fmean(values):.2f}", spread, f"{min(values):.2f} – {max(values):.2f}"])
    title = f"Fashion-MNIST, seeds {args.seeds}: accuracy in %"
    print_table(title, ["", "", "mean", "sd", "lowest – highest"], rows, names=2)
    times, ratios = [], {}
    for stage, title in (("pretrain", "pre-training"), ("finetune", "fine-tuning")):
        each = {name: [result[f"{stage} steps"] for result in results] for name, results in found.items()}
        pairs = [mine / other for mine, other in zip(*each.values(), strict=True)]
        ratios[stage] = pairs
        for name, seconds in each.items():
            times.append([title, name, f"{median(seconds):.1f}", f"{min(seconds):.1f} – {max(seconds):.1f}"])
        times.append([title, "ratio", f"{median(pairs):.2f}", f"{min(pairs):.2f} – {max(pairs):.2f}"])
    print_table("Seconds of the training steps, data included", ["", "", "median", "low – high"], times, names=2)
    save("fashion", {"arguments": vars(args), "found": found, "ratios": ratios})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="of pre-training")
    parser.add_argument("--tuning", type=int, default=500, help="steps of fine-tuning")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
