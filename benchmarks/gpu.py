"""What one CUDA device makes of the project, in eight minutes: whether it works there, and how fast.

    make gpu                                                      (python benchmarks/gpu.py)
    python benchmarks/gpu.py [--seconds 480] [--out runs/bench/gpu] [--toy]

1. The tests marked `cuda`: loss curves of every ZeRO stage and precision against a plain loop, a resume bit for bit,
   gradients that are not finite, features and probes on the device.
2. The path by its commands: shards, a pre-training with few-shot scores, fine-tuning, few-shot on the device and on
   the CPU, whose scores must agree. Beside 1, as neither is timed.
3. Steps of B/16, L/16, H/14 (benchmarks/devicesteps.py): MFU against DDP and timm, memory against the plan.
4. The eigendecomposition of the ridge at ImageNet's shape, on the device and on the CPU.
5. The loader live against a cached batch (benchmarks/loop.py).

Whatever fails or has no time left, the rest still runs. OUT/gpu.json, written anew after every part, a log of each, and
a table. Status 1 where something did not work. --toy: all of it at a size for two CPU cores, side by side, and of the
tests those of features and probes.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CUDA = Path("/dev/nvidiactl").exists()
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a launcher's; each part is its own
SIDE, CLASSES, EACH, SPLITS = 32, 5, 40, ("train", "test")  # of the drawn images
NETWORK = {"patch_size": 4, "layers": 2, "width": 64, "mlp": 128, "heads": 2, "image_size": 24, "num_classes": CLASSES}


@dataclass(frozen=True)
class Part:
    """Commands, one after the other, within so many seconds."""

    name: str
    commands: Sequence[Sequence[object]]
    seconds: float


class Running:
    """A part that has been started, in a session of its own, with a log."""

    def __init__(self, part: Part, out: Path, seconds: float, ends: float) -> None:
        self.part, self.log, self.began = part, out / f"{part.name}.log", time.monotonic()
        self._ends, self._left = min(self.began + seconds, ends), list(part.commands)
        self._file = self.log.open("w")
        self.statuses: list[int | str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._next()

    def _next(self) -> None:
        words = [str(word) for word in self._left.pop(0)]
        settings = {"DS_ACCELERATOR": "cuda" if CUDA else "cpu", "OMP_NUM_THREADS": "4" if CUDA else "1"}
        given = dict(word.split("=", 1) for word in words if word.startswith("DS_ACCELERATOR="))
        words = [word for word in words if not word.startswith("DS_ACCELERATOR=")]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
        self._process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**kept, **settings, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **given},
        )  # fmt: skip

    def done(self) -> bool:
        """Whether it has ended; what is over its time is ended, what has failed is not gone on with."""
        assert self._process is not None
        status = self._process.poll()
        if status is None and time.monotonic() < self._ends:
            return False
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.statuses.append("over its time" if status is None else status)
        if status == 0 and self._left:
            self._next()
            return False
        self._file.close()
        return True

    @property
    def told(self) -> dict[str, Any]:
        """Whether all commands ended well, the seconds, and the log's last lines where they did not."""
        works = self.statuses == [0] * len(self.part.commands)
        found = {"works": works, "seconds": round(time.monotonic() - self.began, 1)}
        said = [] if works else self.log.read_text(errors="replace").splitlines()[-15:]
        return found | ({} if works else {"statuses": self.statuses, "said": said})


def parts(out: Path, toy: bool) -> tuple[list[Part], list[Part]]:
    """Those that may run side by side, and those that are timed."""
    marked = "cuda and not long"
    few = ["-k", "test_device"] if toy else []
    # The files by name: others import packages that a bare machine does not have.
    files = sorted(file for file in ROOT.glob("tests/*/test_*.py") if "mark.cuda" in file.read_text())
    tests = ["-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-m", marked, *few, *files]
    steps = ["benchmarks/devicesteps.py", "--out", out / "steps.jsonl", "--seconds", 200, *(["--toy"] if toy else [])]
    eigh = ["benchmarks/gpu.py", "--eigh", out / "eigh.json", *(["--toy"] if toy else [])]
    sizes = {"ranks": 1, "arch": "vit_ti_16", "batch": 2, "rounds": 1, "block": 1, "workers": 1, "images": 16}
    if not toy:
        sizes |= {"arch": "vit_b_16", "batch": 128, "rounds": 3, "block": 10, "workers": 4, "images": 2048}
    loop = ["benchmarks/loop.py", *(word for name, size in sizes.items() for word in (f"--{name}", size))]
    together = [Part("tests", [tests], 170), Part("path", path(out, toy), 170)]
    return together, [Part("steps", [steps], 240), Part("eigh", [eigh], 30), Part("loop", [loop], 60)]


def path(out: Path, toy: bool) -> list[list[object]]:
    """The commands from images to a score on the device, and the few-shot scores again on the CPU."""
    train, test = (str(out / "shards" / split) for split in SPLITS)
    run, steps = out / "pretrained", 20 if toy else 300
    data = {"train": train, "eval": test, "workers": 1, "crop_area": [0.5, 1.0]}
    shots = {"support": train, "query": test, "shots": [5], "seeds": [0]}
    configs: dict[str, dict[str, Any]] = {
        "pretrain": {
            "model": NETWORK, "data": data, "train": {"global_batch": 50, "steps": steps}, "optimizer": {"lr": 1e-3},
            "fewshot": {"every": steps, **shots}, "deepspeed": {"zero_optimization": {"stage": 1}},
        },
        "finetune": {
            "model": {"image_size": 32, "num_classes": CLASSES}, "data": data,
            "train": {"global_batch": 50, "steps": steps // 2}, "optimizer": {"name": "sgd", "lr": 0.01},
        },
        "fewshot": {
            "data": {"support": train, "query": test, "workers": 1},
            "fewshot": {"shots": [1, 5], "seeds": [0, 1], "probes": ["ridge", "knn10"], "features": ["cls", "mean"]},
        },
    }  # fmt: skip
    for name, config in configs.items():
        quiet = {} if name == "fewshot" else {"logging": {"tensorboard": False, "every": 10}}
        (out / f"{name}.json").write_text(json.dumps({"name": name, **config, **quiet}))

    def start(name: str, folder: Path, *words: object) -> list[object]:
        return [f"launch/{name}.py", "--config", out / f"{name}.json", "--out", folder, *words]

    return [
        *(["launch/shards.py", "build", out / "images" / split, out / "shards" / split] for split in SPLITS),
        start("pretrain", run),
        start("finetune", out / "tuned", "--init", run),
        start("fewshot", out / "fewshot", "--init", run),
        *([] if toy and not CUDA else [["DS_ACCELERATOR=cpu", *start("fewshot", out / "fewshot-cpu", "--init", run)]]),
    ]


def draw_images(folder: Path) -> None:
    """Two image folders of coloured stripes, a direction for each class, under noise: data without a package."""
    from PIL import Image

    draw, (rows, columns) = np.random.default_rng(0), np.mgrid[:SIDE, :SIDE]
    for split, label in itertools.product(SPLITS, range(CLASSES)):
        place, angle = folder / split / f"class{label}", np.pi * label / CLASSES
        place.mkdir(parents=True, exist_ok=True)
        for number in range(EACH):
            phase = rows * np.sin(angle) + columns * np.cos(angle) + draw.uniform(0, 6)
            stripes = 127 + 80 * np.sin(phase)[..., None] + draw.normal(0, 25, (SIDE, SIDE, 3))
            Image.fromarray(stripes.clip(0, 255).astype(np.uint8)).save(place / f"{number:03d}.png")


def scores(out: Path) -> dict[str, float]:
    """The mean few-shot scores on the device, and how far the CPU's are from them at most, where it has any."""
    found = []
    for name in ("fewshot", "fewshot-cpu"):
        file = out / name / "report/report.json"
        rows = json.loads(file.read_text())["summary"] if file.exists() else []
        found.append({f"{row['probe']} {row['features']} {row['shots']}": row["mean"] for row in rows})
    device, host = found
    return {**device, **({"apart": max(abs(device[key] - host[key]) for key in device)} if host else {})}


def eigh(told: Path, toy: bool) -> None:
    """Seconds that the decomposition of the ridge takes on the device and on the CPU, and how far both are apart."""
    import torch

    from fewshot.probes.decomposition import decompose

    n, d, classes = (200, 33, 10) if toy else (25_000, 1_281, 1_000)
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, found = torch.arange(n) % classes, {}
    for name in ("cuda", "cpu") if CUDA else ("cpu",):
        place, seconds = torch.device(name), []
        for _ in range(3):
            rows, targets = x.to(place), labels.to(place)
            began = time.perf_counter()
            weights = decompose(rows, targets, classes).weights(1024.0).cpu()
            seconds.append(time.perf_counter() - began)
        found[name] = (statistics.median(seconds), weights)
    apart = max((weights - found["cpu"][1]).abs().max().item() for _, weights in found.values())
    told.write_text(json.dumps({"decomposed": {name: taken for name, (taken, _) in found.items()}, "apart": apart}))


def results(name: str, out: Path) -> dict[str, Any]:
    """What the files of a part tell."""
    if name == "path":
        return {"scores": scores(out)}
    if name == "steps":
        return {"cases": [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]}
    if name == "eigh":
        return dict(json.loads((out / "eigh.json").read_text()))
    if name == "tests":
        passed = [line.split()[1] for line in (out / "tests.log").read_text().splitlines() if line.startswith("PASSED")]
        return {"passed": passed}
    said = [line for line in (out / "loop.log").read_text().splitlines() if line.endswith(".json")]
    return {"rates": json.loads((ROOT / said[-1]).read_text())["rates"]}


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{name:6} {verdict(told):6} {told['seconds']:6.1f} s" for name, told in found.items()]
    cases = found.get("steps", {}).get("cases", [])
    width = max((len(case["name"]) for case in cases), default=0)
    lines += ["", f"{'step':{width}}  images/s     MFU  of a product  GiB, planned"] if cases else []
    for case in cases:
        if "left_out" in case:
            lines.append(f"{case['name']:{width}}  left out: {case['left_out']}")
            continue
        mfu = f"{case['mfu']:7.1%}" if case["mfu"] else "      –"
        share = case["teraflops"] / case["product_teraflops"]
        held = f"{case['allocated'] / 2**30:6.1f}" if "allocated" in case else "     –"
        planned = f"{case['planned_allocated'] / 2**30:6.1f}" if "planned_allocated" in case else ""
        lines.append(f"{case['name']:{width}}  {case['images_per_second']:8.1f} {mfu} {share:13.1%} {held} {planned}")
    for ratio, value in found.get("loop", {}).get("rates", {}).items():
        lines.append(f"{ratio}: {value:.3f}")
    for place, seconds in found.get("eigh", {}).get("decomposed", {}).items():
        lines.append(f"the ridge's decomposition at ImageNet's shape on the {place}: {seconds:.3f} s")
    return "\n".join(lines)


def verdict(told: dict[str, Any]) -> str:
    return "works" if told["works"] else "FAILED"


def everything(out: Path, limit: float, toy: bool) -> bool:
    """All parts; whether all worked."""
    began, found = time.monotonic(), dict[str, Any]()
    out.mkdir(parents=True, exist_ok=True)
    draw_images(out / "images")
    together, timed = parts(out, toy)
    slower = 10 if toy else 1  # a CPU that others use as well
    # A toy's times mean nothing, so it takes the cores it finds.
    groups = [[*together, *timed]] if toy else [together, *([part] for part in timed)]
    for group in groups:
        running = [
            Running(part, out, slower * part.seconds, began + limit)
            for part in group
            if time.monotonic() < began + limit
        ]
        while running:
            time.sleep(0.05)
            for job in [job for job in running if job.done()]:
                running.remove(job)
                told = job.told
                with contextlib.suppress(OSError, ValueError, LookupError):
                    told |= {key: value for key, value in results(job.part.name, out).items() if key not in told}
                found[job.part.name] = told
                (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
                said = [f"        {line}" for line in told.get("said", [])]
                ended = f"{time.monotonic() - began:5.0f} s  {job.part.name}: {verdict(told)}"
                print("\n".join([ended, *said]), flush=True)
    print(f"\n{table(found)}\n\n{out / 'gpu.json'}")
    return len(found) == len(together) + len(timed) and all(told["works"] for told in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu"))
    parser.add_argument("--seconds", type=float, default=480, help="for all; what is not done by then is left out")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--eigh", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.eigh:
        eigh(args.eigh, args.toy)
    else:
        sys.exit(0 if everything(args.out.resolve(), args.seconds, args.toy) else 1)


if __name__ == "__main__":
    main()
