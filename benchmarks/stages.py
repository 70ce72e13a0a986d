"""A training step under ZeRO 0 to 3 against torch's DistributedDataParallel and FSDP2, on two ranks.

    python benchmarks/stages.py [--rounds 15] [--steps 3] [--batch 8] [--arch vit_ti_16]

One network, one optimizer (the project's fused AdamW; under FSDP2 torch's own, fused), one clipping, the same batches;
all live in the same two processes, which take blocks of steps in turn, from round to round in the other order. Beside
each block the rate of bare matrix products. A step's time is the slower rank's. FSDP2 shards block by block, as its
tutorial does. Ratios are taken within a round. Medians and spread; plot and JSON: runs/bench/stages.png, .json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import ranks
from benchmarks.products import Products
from benchmarks.strips import save_strips
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
from pretrain.training.loss import softmax_loss

RANKS, CLIP, LR, DECAY = 2, 1.0, 1e-4, 0.1
STAGES, PEERS = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"), ("DDP", "FSDP2")
Step = Callable[[Tensor, Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="steps of a block")
    parser.add_argument("--batch", type=int, default=8, help="images per rank")
    parser.add_argument("--arch", default="vit_ti_16")
    args = parser.parse_args()
    if ranks.is_rank():
        measure(args)
    else:
        sys.exit(ranks.launch(RANKS))


def measure(args: argparse.Namespace) -> None:
    """Time all, in turn; rank 0 reports."""
    world = processgroup.start()
    spec, device = spec_from_arch(args.arch), world.device
    ways = {name: zero(int(name[-1]), args) for name in STAGES} | {
        "DDP": ddp(args, device),
        "FSDP2": fsdp(args, device),
    }
    products = Products(spec, args.batch, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    generator = torch.Generator().manual_seed(world.rank)
    for number in range(args.rounds + 1):
        batches = [
            (
                torch.randn(args.batch, 3, 224, 224, generator=generator).to(device),
                torch.randint(1000, (args.batch, 1), generator=generator).to(device),
            )
            for _ in range(args.steps)
        ]
        for name in list(ways)[:: 1 if number % 2 else -1]:
            dist.barrier()
            rate, took = products.rate(), []
            for images, labels in batches:
                began = now(device)
                ways[name](images, labels)
                mine = torch.tensor(now(device, meet=False) - began, device=device)
                took.append(collectives.all_reduce_max(mine).item())
            if number:  # the first round warms up
                seconds[name].append(statistics.median(took))
                rates[name].append(rate)
    if world.main:
        report(args, seconds, rates)
    processgroup.stop()


def now(device: torch.device, *, meet: bool = True) -> float:
    """The time, once the device is done and (`meet`) all ranks are here."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    if meet:
        dist.barrier()
    return time.perf_counter()


def report(args: argparse.Namespace, seconds: dict[str, list[float]], rates: dict[str, list[float]]) -> None:
    """The table, the plot, and every figure as JSON."""
    ratios = {
        f"{stage} ÷ {peer}": [mine / other for mine, other in zip(seconds[stage], seconds[peer], strict=True)]
        for stage in STAGES
        for peer in PEERS
    }
    rows = []
    for name, found in seconds.items():
        against = [spread(ratios[key], ".3f")[0] if (key := f"{name} ÷ {peer}") in ratios else "" for peer in PEERS]
        rows.append((name, *spread(found, ".3f"), *against, *spread([rate / 1e9 for rate in rates[name]])))
    title = f"{args.arch}, fp32, {RANKS} ranks × {args.batch} images: seconds a step, medians of blocks"
    header = ("", "s", "low – high", *(f"÷ {peer}" for peer in PEERS), "mm GFLOP/s", "low – high")
    print_table(title, header, rows)
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    save("stages", {"arguments": vars(args), "seconds": seconds, "rates": rates, "ratios": medians})
    save_strips("stages", title, {"seconds a step": seconds})


def network(args: argparse.Namespace) -> VisionTransformer:
    model = VisionTransformer(spec_from_arch(args.arch))
    initialize(model, 0)
    return model


def adamw(model: nn.Module) -> AdamW:
    optimizer = build_optimizer(model, OptimizerSection(lr=LR, weight_decay=DECAY))
    assert isinstance(optimizer, AdamW)
    return optimizer


def zero(stage: int, args: argparse.Namespace) -> Step:
    model = network(args)
    layout, section = batch_layout(args.batch * RANKS, args.batch, RANKS), {"stage": stage}
    engine = build_engine(model, adamw(model), DeepSpeedSection(zero_optimization=section), layout, CLIP)

    def step(images: Tensor, labels: Tensor) -> None:
        loss = softmax_loss(engine(images), labels, torch.ones(len(labels), device=images.device))
        accumulate(engine, loss)
        update(engine, lr=LR)

    return step


def ddp(args: argparse.Namespace, device: torch.device) -> Step:
    model = network(args).to(device)
    return plain(DistributedDataParallel(model), adamw(model))


def fsdp(args: argparse.Namespace, device: torch.device) -> Step:
    model = network(args).to(device)
    mesh = dist.init_device_mesh(device.type, (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return plain(model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True))


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(images: Tensor, labels: Tensor) -> None:
        softmax_loss(model(images), labels, torch.ones(len(labels), device=images.device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
