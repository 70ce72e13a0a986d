"""What pre-training is worth: a network pre-trained on some classes, fine-tuned on others at a higher resolution.

    python benchmarks/transfer.py [--source fashion-mnist|mnist5k] [--seeds 0,1,2] [--images 1000] [--steps 200]

Pre-trains a small ViT at 20 px on the first five classes. Then, at 28 px and for equally many steps, on a few images of
the other five: fine-tunes it by SGD, and trains the same network from scratch by AdamW. Each takes the learning rate
that a held-out split picks, `finetune.py --sweep` for the one; rates are picked with the first seed. Each seed has a
pre-training, a fine-tuning and a start from scratch of its own. Accuracy is on the test images of the five classes.

Folders: runs/bench/transfer/; JSON: runs/bench/transfer.json. What is finished is not run again.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np

from benchmarks.table import print_table, save
from pretrain.datasets.dataset import Dataset, fingerprint
from pretrain.datasets.sources import open_source
from pretrain.shards.write import write_shards

FOLDER = Path("runs/bench/transfer")
SPLITS = {"fashion-mnist": ("train", "test"), "mnist5k": ("train", "val")}
HELD_OUT = 0.1
SIZES = {"patch_size": 4, "layers": 4, "width": 64, "mlp": 256, "heads": 4, "channels": 1, "num_classes": 5}
AUGMENTATION = {"crop_area": [0.5, 1.0], "flip": False, "workers": 1}
SCRATCH_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TUNING_RATES = (0.003, 0.01, 0.03, 0.1)


def main() -> None:
    args = parse()
    shards = build(args.source, args.images)
    home = FOLDER / f"{args.source}-{args.images}-{args.steps}"
    home.mkdir(parents=True, exist_ok=True)
    task = {"data": {"train": str(shards["few"]), "eval": str(shards["test"]), **AUGMENTATION}}
    length = {"global_batch": 50, "steps": args.steps}
    configs = {
        "pretrain": {
            "model": {**SIZES, "image_size": 20, "representation_size": 64},
            "data": {"train": str(shards["many"]), **AUGMENTATION},
            "train": {"global_batch": 100, "steps": args.pretraining},
            "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
            "schedule": {"warmup_steps": 100},
        },
        "finetune": {
            **task,
            "model": {"image_size": 28, "num_classes": 5},
            "train": length,
            "optimizer": {"name": "sgd", "lr": 0.03, "momentum": 0.9, "clip_norm": 1.0},
            "schedule": {"warmup_steps": args.steps // 10, "decay": "cosine"},
            "sweep": {"lrs": list(TUNING_RATES), "held_out": HELD_OUT},
        },
        "scratch": {
            **task,
            "model": {**SIZES, "image_size": 28},
            "train": length,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
            "schedule": {"warmup_steps": args.steps // 10, "decay": "cosine"},
        },
    }
    for name, config in configs.items():
        path = home / f"{name}.json"
        path.write_text(json.dumps({"name": name, "logging": {"tensorboard": False}, **config}))

    scores: dict[str, list[float]] = {"pre-trained": [], "from scratch": []}
    first, *_ = args.seeds
    tuning_rate = scratch_rate = 0.0
    for seed in args.seeds:
        before = home / f"pretrain_{seed}"
        command("pretrain", home, before, f"seed={seed}")
        if seed == first:
            sweep = home / "sweep"
            command("finetune", home, sweep, f"seed={seed}", init=before, flags=["--sweep"])
            tuning_rate = json.loads((sweep / "sweep.json").read_text())["chosen"]
            tried = {}
            for rate in SCRATCH_RATES:
                out = home / f"scratch_lr_{rate:g}"
                command("scratch", home, out, f"seed={seed}", f"optimizer.lr={rate}", f"data.held_out={HELD_OUT}")
                tried[rate] = top1(out)
            scratch_rate = max(tried, key=tried.__getitem__)
        out = home / f"finetune_{seed}"
        command("finetune", home, out, f"seed={seed}", f"optimizer.lr={tuning_rate}", init=before)
        scores["pre-trained"].append(top1(out))
        out = home / f"scratch_{seed}"
        command("scratch", home, out, f"seed={seed}", f"optimizer.lr={scratch_rate}")
        scores["from scratch"].append(top1(out))
    report(args, scores, {"pre-trained": tuning_rate, "from scratch": scratch_rate})


def build(source: str, images: int) -> dict[str, Path]:
    """Shards of the first five classes ("many"), of so many images of the others ("few"), and of their "test"."""
    train, test = (open_source(source, split) for split in SPLITS[source])
    classes = train.labels
    few = np.concatenate([np.flatnonzero(classes == label)[: images // 5] for label in range(5, 10)])
    parts = {
        "many": rows_of(train, np.flatnonzero(classes < 5), 0),
        f"few-{images}": rows_of(train, few, 5),
        "test": rows_of(test, np.flatnonzero(test.labels >= 5), 5),
    }
    folders = {}
    for name, data in parts.items():
        folder = FOLDER / "shards" / source / name
        if not (folder / "index.vfi").is_file():
            write_shards(data, folder)
        folders[name.partition("-")[0]] = folder
    return folders


def rows_of(data: Dataset, rows: np.ndarray, first_class: int) -> Dataset:
    """Some rows of a data set, whose five classes are numbered from 0."""
    names = data.classes[first_class : first_class + 5] if data.classes else None
    read = data.read
    return replace(
        data,
        labels=data.labels[rows] - first_class,
        classes=names,
        fingerprint=fingerprint([str(data.fingerprint).encode(), rows]),
        read=lambda row: read(int(rows[row])),
    )


def command(
    name: str, home: Path, out: Path, *changes: str, init: Path | None = None, flags: Sequence[str] = ()
) -> None:
    """Run a config to its end; one that is finished says so."""
    script = "finetune" if name == "finetune" else "pretrain"
    words = [sys.executable, f"launch/{script}.py", "--config", str(home / f"{name}.json"), "--out", str(out), *flags]
    print(f"{out}: {' '.join(changes)}", flush=True)
    with (home / "console.txt").open("a") as console:
        subprocess.run(
            [*words, *(["--init", str(init)] if init else []), *changes],
            stdout=console,
            stderr=console,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            check=True,
        )


def top1(out: Path) -> float:
    """The last evaluation's top-1, in %."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return 100 * next(line["eval/top1"] for line in reversed(lines) if "eval/top1" in line)


def report(args: argparse.Namespace, scores: dict[str, list[float]], rates: dict[str, float]) -> None:
    margins = [one - other for one, other in zip(*scores.values(), strict=True)]
    rows = [
        [name, f"{rates[name]:g}", f"{fmean(found):.1f}", f"{stdev(found):.1f}", f"{min(found):.1f} – {max(found):.1f}"]
        for name, found in scores.items()
    ]
    rows.append(
        ["margin", "", f"{fmean(margins):.1f}", f"{stdev(margins):.1f}", f"{min(margins):.1f} – {max(margins):.1f}"]
    )
    title = f"{args.source}: {args.images} images of five new classes, {args.steps} steps at 28 px, top-1 in %"
    print_table(title, ["start", "rate", "mean", "sd", "lowest – highest"], rows)
    save("transfer", {"scores": scores, "rates": rates, "margins": margins, "arguments": vars(args)})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=tuple(SPLITS), default="fashion-mnist")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretraining", type=int, default=1000, help="steps of pre-training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
