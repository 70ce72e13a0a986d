"""The planner's memory against real ranks on the CPU.

    python benchmarks/memory.py [--quick | --huge] [--steps 3] [--arch vit_ti_16] [--every N] [--apart]

Each case runs in ranks of its own: network, engine and a few steps on random images. Measured is what the process
takes from the system (resident memory without files' pages, looked at every 2 ms) above what it took once all was
imported and a network of a few thousand values had been trained, the worst rank's: once with each tensor in pages of
its own, which go back to the system when it is freed (what torch allocates), and once as glibc does by default, which
keeps what was freed. From the engine's tensors: the bytes of parameters, gradients (the most after a backward pass) and
optimizer. Without --quick or --huge (ViT-H/14, up to 20 GB): Ti/16 and B/16, 96 cases of each; --arch takes one of
them, --every N each N-th case, and --apart leaves glibc's way out. Table; JSON: runs/bench/memory.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import ctypes
import gc
import json
import resource
import statistics
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from itertools import product
from types import TracebackType
from typing import Any

import torch

from benchmarks.started import Forked
from benchmarks.table import print_table, save
from pretrain.checkpoint.pieces import AVERAGE
from pretrain.checkpoint.section import CheckpointSection
from pretrain.engine import processgroup
from pretrain.engine.engine import build_engine
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.engine.step import accumulate, update
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec, spec_from_arch
from pretrain.model.vit import Checkpointing, VisionTransformer
from pretrain.plan.job import Job
from pretrain.plan.memory.rank import RankMemory, rank_memory
from pretrain.stream.section import DataSection
from pretrain.training.loss import softmax_loss

_MIB = 1 << 20
_ANSWER = "measured: "


@dataclass(frozen=True)
class Case:
    """One run of some ranks."""

    arch: str
    stage: int
    ranks: int
    micro_batch: int
    checkpointing: Checkpointing
    accumulation: int = 1
    apart: bool = True  # whether each tensor has pages of its own

    def job(self) -> Job:
        """As the planner takes it."""
        return Job(
            spec_from_arch(self.arch),
            batch_layout(self.ranks * self.micro_batch * self.accumulation, self.micro_batch, self.ranks),
            torch.float32,
            "softmax",
            self.checkpointing,
            False,
            0,
            OptimizerSection(lr=1e-4, weight_decay=0.1),
            DeepSpeedSection.model_validate({"zero_optimization": {"stage": self.stage}}),
            DataSection(),
            CheckpointSection(),
            None,
            "cpu",
        )


@dataclass(frozen=True)
class Measured:
    """Of the rank that took most. Bytes above the imports."""

    peak: int
    by_phase: dict[str, int]  # the peak while the engine is built, and in each phase of a step
    parameters: int
    gradients: int
    optimizer: int


Found = tuple[Case, RankMemory, Measured, Measured | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six cases")
    parser.add_argument("--huge", action="store_true", help="ViT-H/14 alone, one rank")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--arch", help="the cases of this network alone")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th case alone")
    parser.add_argument("--apart", action="store_true", help="measure each case once, with pages of its own")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_rank(Case(**json.loads(args.case)), args.steps)
        return
    cases = quick() if args.quick else huge() if args.huge else grid()
    cases = [case for case in cases if args.arch in (None, case.arch)][:: args.every]
    found: list[Found] = []
    for case in cases:
        apart = measure(case, args.steps)
        together = None if args.apart else measure(replace(case, apart=False), args.steps)
        found.append((case, rank_memory(case.job()), apart, together))
        print(f"{len(found)} of {len(cases)}: {case}", flush=True)
    report(found)


def quick() -> list[Case]:
    """One of each kind."""
    return [
        Case("vit_ti_16", 1, 1, 8, "none"),
        Case("vit_ti_16", 0, 2, 4, "selective"),
        Case("vit_b_16", 1, 2, 4, "none"),
        Case("vit_b_16", 2, 1, 8, "full"),
        Case("vit_b_16", 3, 2, 4, "full"),
        Case("vit_b_16", 0, 1, 1, 3, 2),
    ]


def grid() -> list[Case]:
    """What the planner is held to."""
    kinds: list[Checkpointing] = ["none", "full", "selective", 3]
    return [
        Case(arch, stage, ranks, micro, kind, accumulation=2 if micro == 1 else 1)
        for arch, stage, ranks, micro, kind in product(("vit_ti_16", "vit_b_16"), range(4), (1, 2), (1, 4, 8), kinds)
    ]


def huge() -> list[Case]:
    """One rank takes up to 20 GB."""
    return [Case("vit_h_14", stage, 1, 1, "none") for stage in (1, 2, 3, 0)]


def measure(case: Case, steps: int = 3) -> Measured:
    """Run the case's ranks."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = ["--steps", steps, "--case", json.dumps(asdict(case))]
        ranks = Forked(case.ranks, words, log, script="benchmarks/memory.py")
        if any(ranks.wait(3600)):
            sys.exit(f"{case}: {ranks.said}")
        answers = [line.removeprefix(_ANSWER) for line in ranks.said.splitlines() if line.startswith(_ANSWER)]
    return max((Measured(**json.loads(answer)) for answer in answers), key=lambda found: found.peak)


def report(found: list[Found]) -> None:
    """The table, and every figure as JSON."""
    rows, errors = [], []
    for case, planned, apart, together in found:
        taken = planned.allocated + planned.outside
        errors.append(taken / apart.peak - 1)
        parts = ("parameters", "gradients", "optimizer")
        exact = {part: getattr(planned, part) - getattr(apart, part) for part in parts}
        rows.append(
            (
                f"{case.arch} ZeRO {case.stage}",
                f"{case.ranks} × {case.accumulation} × {case.micro_batch}",
                str(case.checkpointing),
                f"{taken / _MIB:,.0f}",
                f"{apart.peak / _MIB:,.0f}",
                f"{errors[-1]:+.1%}",
                f"{planned.peak} {max(apart.by_phase, key=lambda phase: apart.by_phase[phase])}",
                f"{together.peak / _MIB:,.0f}" if together else "",
                f"{planned.total / _MIB:,.0f}",
                "exact" if not any(exact.values()) else str(exact),
            )
        )
    header = (
        *("", "ranks × accumulation × images", "checkpointing", "planned, MiB", "measured", "error", "peak in"),
        *("glibc", "planned at most", "states"),
    )
    print_table("Memory above the imports", header, rows, names=3)
    print(f"error: median {statistics.median(map(abs, errors)):.1%}, worst {max(errors, key=abs):+.1%}")
    keys = ("planned", "measured", "by_default")
    save(
        "memory",
        {
            "cases": [
                {**asdict(case), **{key: asdict(one) for key, one in zip(keys, rest, strict=True) if one}}
                for case, *rest in found
            ]
        },
    )


class Watch:
    """The peak of this process's own memory, looked at every 2 ms while the context lasts."""

    def __enter__(self) -> Watch:
        self.base, self._peak, self._ends = _own(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()

    def peak(self) -> int:
        """Bytes above the beginning, since this was last asked."""
        found, self._peak = max(self._peak, _own()), 0
        return found - self.base

    def _look(self) -> None:
        while not self._ends.wait(0.002):
            self._peak = max(self._peak, _own())


def run_rank(case: Case, steps: int) -> None:
    """Be one of the case's ranks."""
    processgroup.start()
    warm_up(case)
    if case.apart:  # each tensor of 64 KiB or more; the other is the number of such areas
        libc = ctypes.CDLL(None)
        assert libc.mallopt(-3, 1 << 16) == libc.mallopt(-4, 1 << 30) == 1
    gc.collect()
    phases: dict[str, int] = {}
    with Watch() as watch:

        def phase(name: str) -> None:
            phases[name] = max(phases.get(name, 0), watch.peak())

        job = case.job()
        model = VisionTransformer(job.spec, job.checkpointing)
        initialize(model, 0)
        phase("network")
        optimizer = build_optimizer(model, job.optimizer)
        engine = build_engine(model, optimizer, job.deepspeed, job.layout, job.optimizer.clip_norm)
        phase("engine")
        engine.train()
        gradients = 0
        for _ in range(steps):
            for _ in range(case.accumulation):
                images, labels = torch.randn(case.micro_batch, 3, 224, 224), torch.randint(1000, (case.micro_batch, 1))
                loss = softmax_loss(engine(images), labels, torch.ones(case.micro_batch))
                phase("forward")
                accumulate(engine, loss)
                phase("backward")
                gradients = max(gradients, gradient_bytes(engine))
            update(engine, lr=1e-4)
            phase("update")
    peak = max(value for name, value in phases.items() if name not in ("network", "engine"))
    found = Measured(peak, phases, parameter_bytes(engine), gradients, optimizer_bytes(engine))
    print(_ANSWER + json.dumps(asdict(found)), flush=True)
    processgroup.stop()


def warm_up(case: Case) -> None:
    """Have torch load what it loads with the first step of any network."""
    model = VisionTransformer(ViTSpec(patch_size=16, layers=1, width=8, mlp=8, heads=1, image_size=32), "full")
    initialize(model, 0)
    softmax_loss(model(torch.randn(2, 3, 32, 32)), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2)).backward()


def parameter_bytes(engine: Any) -> int:
    """Of what the network computes with."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    held = zero.fp16_partitioned_groups_flat if stage == 3 else list(engine.module.parameters())
    return storage_bytes(held)


def optimizer_bytes(engine: Any) -> int:
    """Of fp32 weights that are no parameters of the network, and of the states but for the average."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    computed = zero.fp16_partitioned_groups_flat if stage == 3 else list(engine.module.parameters())
    addresses = {tensor.untyped_storage().data_ptr() for tensor in computed}
    state = engine.basic_optimizer.state
    weights = [flat for flat in state if flat.untyped_storage().data_ptr() not in addresses]
    return storage_bytes(
        [*weights, *(kept for kinds in state.values() for kind, kept in kinds.items() if kind != AVERAGE)]
    )


def average_bytes(engine: Any) -> int:
    """Of the averaged weights."""
    return storage_bytes([kinds[AVERAGE] for kinds in engine.basic_optimizer.state.values() if AVERAGE in kinds])


def gradient_bytes(engine: Any) -> int:
    """Of the gradients held now, after a backward pass."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    if engine.zero_optimization_stage() == 0:  # autograd may take a part of a larger tensor for one
        return sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    held = [getattr(parameter, name, None) for parameter in parameters for name in ("grad", "grad_accum")]
    held += [getattr(zero, "grad_partitions_flat_buffer", None), *getattr(zero, "fp32_groups_gradients_flat", ())]
    for kept in (getattr(zero, "averaged_gradients", {}), getattr(zero, "all_grad_tensors", {})):
        held += [gradient for group in kept.values() for gradient in group or ()]
    return storage_bytes([gradient for gradient in held if gradient is not None])


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Of the storages behind the tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _own() -> int:
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * resource.getpagesize()


if __name__ == "__main__":
    main()
