"""A training step through ZeRO-1 against torch's DistributedDataParallel, on two CPU ranks.

    python benchmarks/step.py [--rounds 30] [--steps 4] [--batch 8] [--arch vit_ti_16]

One network, one optimizer (the project's fused AdamW), one clipping, the same batches; both live in the same two
processes, which take blocks of steps in turn, now the one first, now the other. A step's time is the slower rank's.
Medians and spread; JSON beside them: runs/bench/step.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.table import print_table, save, spread
from pretrain.engine import processgroup
from pretrain.engine.engine import build_engine
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import AdamW, build_optimizer
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.engine.step import accumulate, update
from pretrain.model.initialization import initialize
from pretrain.model.spec import spec_from_arch
from pretrain.model.vit import VisionTransformer
from pretrain.ranks import collectives
from pretrain.ranks.launcher import free_port
from pretrain.training.loss import softmax_loss

RANKS, CLIP, LR = 2, 1.0, 1e-4
Step = Callable[[Tensor, Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4, help="steps of a block")
    parser.add_argument("--batch", type=int, default=8, help="images per rank")
    parser.add_argument("--arch", default="vit_ti_16")
    args = parser.parse_args()
    if "RANK" in os.environ:
        measure(args)
    else:
        sys.exit(launch())


def launch() -> int:
    """This command again, as the ranks of one group; the worst status."""
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ, **place}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**settings, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(RANKS)
    ]
    return max(abs(rank.wait()) for rank in ranks)


def measure(args: argparse.Namespace) -> None:
    """Time both, in turn; rank 0 reports."""
    world = processgroup.start()
    ways = {"ZeRO-1": zero1(args), "DDP": ddp(args)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    generator = torch.Generator().manual_seed(world.rank)
    for number in range(args.rounds + 1):
        batches = [
            (
                torch.randn(args.batch, 3, 224, 224, generator=generator),
                torch.randint(1000, (args.batch, 1), generator=generator),
            )
            for _ in range(args.steps)
        ]
        for name in list(ways)[:: 1 if number % 2 else -1]:
            for images, labels in batches:
                dist.barrier()
                began = time.perf_counter()
                ways[name](images, labels)
                took = collectives.all_reduce_max(torch.tensor(time.perf_counter() - began))
                if number:  # the first round warms up
                    seconds[name].append(took.item())
    if world.main:
        report(args, seconds)
    processgroup.stop()


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    """The table, and every figure as JSON."""
    blocks = {
        name: [statistics.median(found[at : at + args.steps]) for at in range(0, len(found), args.steps)]
        for name, found in seconds.items()
    }
    ratios = [zero / other for zero, other in zip(blocks["ZeRO-1"], blocks["DDP"], strict=True)]
    rows = [(name, *spread(found, ".3f")) for name, found in seconds.items()]
    title = f"{args.arch}, fp32, {RANKS} ranks × {args.batch} images: seconds a step"
    print_table(title, ("", "median", "low – high"), rows)
    ratio = statistics.median(seconds["ZeRO-1"]) / statistics.median(seconds["DDP"])
    print(f"ratio of medians {ratio:.3f}; of blocks {' median, '.join(spread(ratios, '.3f'))}")
    save("step", {"arguments": vars(args), "seconds": seconds, "ratio": ratio, "ratios_of_blocks": ratios})


def network(args: argparse.Namespace) -> tuple[VisionTransformer, AdamW]:
    model = VisionTransformer(spec_from_arch(args.arch))
    initialize(model, 0)
    optimizer = build_optimizer(model, OptimizerSection(lr=LR, weight_decay=0.1))
    assert isinstance(optimizer, AdamW)
    return model, optimizer


def zero1(args: argparse.Namespace) -> Step:
    model, optimizer = network(args)
    layout = batch_layout(args.batch * RANKS, args.batch, RANKS)
    engine = build_engine(model, optimizer, DeepSpeedSection(zero_optimization={"stage": 1}), layout, CLIP)

    def step(images: Tensor, labels: Tensor) -> None:
        loss = softmax_loss(engine(images), labels, torch.ones(len(labels)))
        accumulate(engine, loss)
        update(engine, lr=LR)

    return step


def ddp(args: argparse.Namespace) -> Step:
    model, optimizer = network(args)
    parallel = DistributedDataParallel(model)

    def step(images: Tensor, labels: Tensor) -> None:
        softmax_loss(parallel(images), labels, torch.ones(len(labels))).backward()
        nn.utils.clip_grad_norm_(parallel.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
