"""What one CUDA device makes of the project: whether it trains, resumes and saves there, and how fast.

    python benchmarks/cuda.py [--seconds 300] [--out runs/bench/cuda] [--toy]

What only has to work runs at once: the quick start by its commands, and its probes on the CPU again; tests/engine
against plain loops on the device; networks trained twice, and halted and resumed. Meanwhile the runs to be timed come
to where they would train, and are stopped (SIGSTOP); then each goes on alone until enough steps are timed. Figures:
OUT/cuda.json, written anew after every part, and a log of each. --toy: small enough for two CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

CUDA, PYTHON = shutil.which("nvidia-smi") is not None, sys.executable
WARM, TIMED = 5, 10  # steps that are not timed, and the least that are
BATCHES = {"b16": (512, 128), "l16": (256, 64), "h14": (128, 32)}  # global, micro
# Name, which begins with its config's → words, seconds to be timed.
RUNS: dict[str, tuple[list[str], float]] = {
    "b16": (["data.workers=4"], 5),
    "b16-14-threads": (["data.workers=14"], 5),
    "h14": (["data.workers=4"], 6),
    "h14-deterministic": (["data.workers=4", "train.deterministic=true"], 6),
    "l16-saving": (["data.workers=4", "checkpoint.every=25", "checkpoint.every_minutes=null", "checkpoint.keep=1"], 25),
    "b16-compiled": (["data.workers=4", "train.compile=true"], 5),
    "h14-compiled": (["data.workers=4", "train.compile=true"], 6),
}
TOY = "model.arch=vit_ti_16 model.layers=2 model.image_size=32 model.num_classes=10 model.representation_size=null"
TOY += " data.workers=1 train.global_batch=8 train.micro_batch=4 checkpoint.every=9"
CURVES = "tests/engine/test_loss_curves.py::test_"
TESTS = {
    "stages": f"{CURVES}every_zero_stage_and_accumulation_is_the_plain_loop",
    "half-precision": f"{CURVES}half_precision_offload_and_checkpointing_are_the_plain_loop",
    "resume": "tests/engine/test_resume.py",
}
SHARDS = ("mnist5k mnist/train", "mnist5k mnist/val", "digits digits/train", "digits digits/test")
PHOTOS = "from benchmarks.photos import write_photos; from pathlib import Path; write_photos(Path({!r}), {}, shard=256)"


class Job:
    """A command in a session of its own, which prints to a log."""

    def __init__(self, name: str, words: Sequence[object], out: Path, limit: float = 1e9, **env: str) -> None:
        self.name, self.log, self.began = name, out / f"{name}.log", time.monotonic()
        self.ends, self.over = self.began + limit, False
        paths = {"PATH": Path(PYTHON).parent, "PYTHONPATH": ROOT}
        settings = {key: f"{first}:{os.environ.get(key, '')}" for key, first in paths.items()}
        settings |= {"OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "1", **env}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words], cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def done(self) -> bool:
        """Whether it has ended; one that is over its limit is ended."""
        if self.process.poll() is None and time.monotonic() < self.ends:
            return False
        self.over = self.process.poll() is None
        self.send(signal.SIGKILL)
        self.process.wait()
        return True

    def told(self) -> dict[str, Any]:
        """Its status and time, and its last lines."""
        status = "over its limit" if self.over else self.process.poll()
        return {"status": status, "seconds": time.monotonic() - self.began, "said": self.said.splitlines()[-3:]}


class Timed(Job):
    """A run of launch/pretrain.py that is stopped before it trains, or once it has compiled, until it is its turn."""

    def __init__(self, name: str, out: Path, toy: bool) -> None:
        self.run, self.watched, self.held = out / "runs" / name, out / f"{name}.json", False
        words, _ = RUNS[name]
        self.compiles, (batch, micro) = "train.compile=true" in words, BATCHES[name[:3]]
        words = [f"train.global_batch={batch}", f"train.micro_batch={micro}", *words, *(TOY.split() if toy else [])]
        words += [f"data.train={out / 'photos/shards'}", "train.steps=100000", "logging.every=1"]
        watch = [PYTHON, "benchmarks/cuda.py", "--watch", self.watched, "--", "launch/pretrain.py"]
        super().__init__(name, [*watch, "--config", f"{name[:3]}.json", "--out", self.run, *words], out)

    def lines(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def hold(self) -> bool:
        """Stop it if it has come so far; whether it is stopped, or has ended."""
        if not self.held and (self.lines() if self.compiles else "accumulation ×" in self.said):
            self.send(signal.SIGSTOP)
            self.held = True
        return self.held or self.process.poll() is not None

    def time(self, seconds: float, limit: float) -> dict[str, Any]:
        """Let it train for so many seconds once it is warm, and end it."""
        self.send(signal.SIGCONT)
        arrived: list[float] = []
        before, self.ends = len(self.lines()), time.monotonic() + limit
        while not self.done():
            time.sleep(0.01)
            arrived += [time.monotonic()] * (len(self.lines()) - before - len(arrived))
            if len(arrived) > WARM + TIMED and time.monotonic() > arrived[WARM] + seconds:
                break
        if CUDA and self.name == "b16" and self.process.poll() is None:
            self.watched.with_suffix(".profile").touch()
            time.sleep(8)
        self.ends = 0.0
        self.done()
        lines, steps = self.lines()[before + WARM :], list(zip(arrived[WARM:], arrived[WARM + 1 :], strict=False))
        if len(steps) < 3:
            return self.told()
        keys, batch = ("images_per_second", "mfu", "data_wait"), lines[0]["images"] // lines[0]["step"]
        return {
            **{key: statistics.median(line[key] for line in lines) for key in keys if lines[0].get(key) is not None},
            "by_the_clock": batch * len(steps) / (steps[-1][1] - steps[0][0]),
            "saves": re.findall(r"saved .* in ([\d.]+) s(?:, training waited ([\d.]+) s)?", self.said),
            "steps": [round(later - earlier, 3) for earlier, later in steps],
            **(json.loads(self.watched.read_text()) if self.watched.exists() else {}),
        }


def watch(told: Path, words: Sequence[str]) -> None:
    """Run a script and tell what device memory it took, in GiB; profile it once there is a file that asks for it."""

    def look() -> None:
        found: dict[str, Any] = {}
        while True:
            time.sleep(0.2)
            torch = sys.modules.get("torch")
            if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
                continue
            found |= {kind: getattr(torch.cuda, f"max_memory_{kind}")() / 2**30 for kind in ("allocated", "reserved")}
            if told.with_suffix(".profile").exists() and "profile" not in found:
                found["profile"] = profiled(2.0)
            told.write_text(json.dumps(found))

    threading.Thread(target=look, daemon=True).start()
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def profiled(seconds: float) -> dict[str, float]:
    """The device's share of time at work, and its kernels by time, in % of all."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        time.sleep(seconds)
    rows = {row.key[:90]: row.self_device_time_total / 1e4 / seconds for row in recorded.key_averages()}
    return {"busy": sum(rows.values()), **dict(sorted(rows.items(), key=lambda row: -row[1])[:25])}


def quickstart(out: Path, toy: bool) -> str:
    """The quick start's commands, shortened, and its probes once more on the CPU, as a shell's lines."""
    here, steps = shlex.quote(str(out)), f"train.steps={20 if toy else 400}"
    run = f"deepspeed --num_gpus 1 launch/pretrain.py --config quickstart/pretrain.json --out {here}/pretrain {steps}"
    init = f"--init {here}/pretrain --out {here}"
    tune = f"deepspeed --num_gpus 1 launch/finetune.py --config quickstart/finetune.json {init}/finetune"
    probe = f"{shlex.quote(PYTHON)} launch/fewshot.py --config quickstart/fewshot.json --shots 1,5 {init}/fewshot"
    return f"""set -e; {run}
    {tune} {"train.steps=20" if toy else ""} & tuning=$!; {probe} & probing=$!
    DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= {probe}-cpu; wait $probing; wait $tuning"""


def scores(out: Path) -> dict[str, Any]:
    """The quick start's scores at 5 shots, and how far the CPU's are from the device's."""
    found = []
    for name in ("fewshot", "fewshot-cpu"):
        rows = json.loads((out / name / "report/report.json").read_text())["summary"]
        found.append({f"{row['probe']} {row['features']} {row['shots']}": row["mean"] for row in rows})
    device, host = found
    tuned = json.loads((out / "finetune/metrics.jsonl").read_text().splitlines()[-1])
    apart = max(abs(device[key] - host[key]) for key in device)
    return {"apart": apart, "tuned": tuned, **{key: device[key] for key in device if key.endswith(" 5")}}


def repeats(out: Path, toy: bool) -> list[object]:
    """Words for tests/engine/variants.py: small networks of the sequences and heads of large ones, each thrice."""
    config = {
        "name": "repeat", "data": {"train": str(out / "photos/shards"), "workers": 2}, "optimizer": {"lr": 1e-3},
        "model": {"patch_size": 16, "layers": 2, "width": 256, "mlp": 512, "heads": 4, "num_classes": 10,
                  "image_size": 32 if toy else 224},
        "train": {"global_batch": 8 if toy else 32, "steps": 3 if toy else 6}, "schedule": {"warmup_steps": 0},
        "logging": {"every": 1, "tensorboard": False}, "checkpoint": {"keep": 1},
    }  # fmt: skip
    (out / "repeat.json").write_text(json.dumps(config))
    larger = ["model.patch_size=14", "model.width=320", "model.mlp=640"]  # as H/14: 257 tokens, heads of 80
    bf16 = ["deepspeed.zero_optimization.stage=1", "deepspeed.bf16.enabled=true"]
    ways: dict[str, list[str]] = {"64 fp32": []}
    ways |= {} if toy else {"80 fp32": larger, "64 bf16": bf16, "80 bf16": [*larger, *bf16]}
    ways |= {f"{name} deterministic": [*words, "train.deterministic=true"] for name, words in ways.items()}
    told = {f"{name}/{kind}": words for name, words in ways.items() for kind in ("through", "again", "halted")}
    return [PYTHON, "tests/engine/variants.py", out / "repeat.json", out / "repeats", json.dumps(told)]


def same_bits(out: Path) -> dict[str, Any]:
    """Of each network the relative difference of the gradient norms of a second run, and of one that was resumed."""

    found = {}
    for folder in sorted((out / "repeats").iterdir()):
        texts = {kind: (folder / kind / "metrics.jsonl").read_text() for kind in ("through", "again", "halted")}
        norms = {kind: [json.loads(line)["grad_norm"] for line in text.splitlines()] for kind, text in texts.items()}
        for kind, values in norms.items():
            pairs = zip(norms["through"], values, strict=True)
            found[f"{folder.name}, {kind}"] = max(abs(one / other - 1) for one, other in pairs)
    return found


def everything(out: Path, limit: float, toy: bool) -> None:
    """All parts: first at once what is not timed, then what is, one after the other."""
    began, results, more = time.monotonic(), dict[str, Any](), {"quickstart": scores, "repeats": same_bits}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    def tell(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        (out / "cuda.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{time.monotonic() - began:5.0f} s  {name}: {json.dumps(found)[:300]}", flush=True)

    def settle(jobs: list[Job]) -> list[Job]:
        """Tell of those that have ended; the others, after a moment."""
        for job in (ended := [job for job in jobs if job.done()]):
            found = job.told()
            try:
                found |= more[job.name](out) if job.name in more else {}
            except (OSError, ValueError, KeyError, IndexError) as error:
                found["error"] = repr(error)
            tell(job.name, found)
        time.sleep(0.1)
        return [job for job in jobs if job not in ended]

    made = [Job("photos", [PYTHON, "-c", PHOTOS.format(str(out / "photos"), 64 if toy else 2048)], out, limit)]
    for name, folder in map(str.split, SHARDS):
        words = ["launch/shards.py", "build", name, f"data/quickstart/{folder}", "--split", Path(folder).name]
        made.append(Job(f"build-{folder.replace('/', '-')}", [PYTHON, *words], out, limit))
    pytest, tests = [PYTHON, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"], TESTS if CUDA else {}
    working = [Job(name, [*pytest, test], out, 0.4 * limit, DS_ACCELERATOR="cuda") for name, test in tests.items()]
    while made:
        made = settle(made)
    working.append(Job("quickstart", ["bash", "-c", quickstart(out, toy)], out, 0.7 * limit))
    working.append(Job("repeats", repeats(out, toy), out, 0.4 * limit))
    waiting = [Timed(name, out, toy) for name in (("b16", "l16-saving") if toy else RUNS)]
    try:
        while any([not run.hold() for run in waiting] + [bool(working)]) and time.monotonic() < began + 0.4 * limit:
            working = settle(working)
        for run in waiting:
            left = began + limit - time.monotonic()
            tell(run.name, run.time(1 if toy else RUNS[run.name][1], min(left, 50)))
        while working and time.monotonic() < began + limit:
            working = settle(working)
    finally:
        for job in [*working, *waiting]:
            job.ends = 0.0
            job.done()
        settle(working)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/cuda"))
    parser.add_argument("--seconds", type=float, default=300, help="for all; what is not done by then is left out")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not CUDA:
        os.environ["DS_ACCELERATOR"] = "cpu"
    watch(args.watch, args.words) if args.watch else everything(args.out.resolve(), args.seconds, args.toy)


if __name__ == "__main__":
    main()
