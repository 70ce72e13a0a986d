"""Training steps on one device: the engine, DDP around the same network, timm's network; time, MFU, memory.

    python benchmarks/devicesteps.py [--out runs/bench/gpu/steps.jsonl] [--seconds 240] [--toy]

Whole steps (forward, backward, clipping, fused AdamW) of the paper's recipes in bf16, on images that are there: the
engine under ZeRO-1 with fp32 weights in the optimizer, the others with fp32 weights under autocast. Compiled is by
block for all. The most telling cases come first; those that the time does not allow are left out. A line of JSON for
each case, written as soon as it is known: seconds of a step in three blocks of steps, MFU, device memory and what was
planned of it, and the rate of a large matrix product right after it. On the CPU (--toy) it shows that all of it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pretrain.configfile import read_config
from pretrain.engine import processgroup
from pretrain.engine.engine import build_engine, free_memory, precision, release
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.step import accumulate, update
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer
from pretrain.plan.flops import training_flops
from pretrain.plan.memory.rank import rank_memory
from pretrain.plan.peak import device_name, peak_flops
from pretrain.ranks.collectives import World
from pretrain.training.config import RunConfig
from pretrain.training.loss import choose_loss

BLOCKS, LEAST, ENOUGH = 3, 3, 0.5  # blocks of at least so many steps and seconds
TOY = ["model.arch=vit_ti_16", "model.layers=1", "model.image_size=32", "model.num_classes=10"]
TIMM = {"b16": "vit_base_patch16_224", "l16": "vit_large_patch16_224", "h14": "vit_huge_patch14_224"}
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One network, trained one way."""

    config: str
    micro_batch: int
    way: Literal["engine", "ddp", "timm"] = "engine"
    compiled: bool = False
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        parts = (self.way, f"{self.config} × {self.micro_batch}", self.compiled and "compiled")
        return ", ".join(filter(None, (*parts, self.checkpointing != "none" and f"recomputing {self.checkpointing}")))


def cases(toy: bool) -> list[Case]:
    """The most telling first."""
    if toy:
        return [
            Case("b16", 4, compiled=True), Case("b16", 4, "ddp"), Case("b16", 4, "timm"),
            Case("b16", 8, checkpointing="full"), Case("b16", 8),
        ]  # fmt: skip
    sizes = {"b16": (128, 256), "l16": (64, 128), "h14": (32, 64)}
    found = []
    for config, (micro, _) in sizes.items():
        both = [(way, compiled) for way in ("engine", "ddp", "timm") for compiled in (False, True)]
        found += [Case(config, micro, way, compiled) for way, compiled in both]
    found += [Case(config, micro, "engine", True) for config, (_, micro) in sizes.items()]
    found += [Case(config, micro, "engine", False, "full") for config, (_, micro) in sizes.items()]
    found += [Case(config, micro, "engine", True, "selective") for config, (_, micro) in sizes.items()]
    return found + [Case(config, micro, "engine") for config, (_, micro) in sizes.items()]


def read(case: Case, toy: bool) -> RunConfig:
    words = [f"train.global_batch={case.micro_batch}", f"train.micro_batch={case.micro_batch}"]
    words += [f"train.compile={json.dumps(case.compiled)}", f"train.activation_checkpointing={case.checkpointing}"]
    return read_config(RunConfig, f"{case.config}.json", [*words, *(TOY if toy else [])])


@contextlib.contextmanager
def stepping(case: Case, config: RunConfig, world: World, dtype: torch.dtype) -> Iterator[Step]:
    """What makes a step of the case, on images that lie on the device; `free_memory` frees what it held afterwards."""
    spec, device, rows = config.model.spec(), world.device, case.micro_batch
    images = torch.randn(rows, spec.channels, spec.image_size, spec.image_size, device=device)
    labels, valid = torch.randint(spec.num_classes, (rows, 1), device=device), torch.ones(rows, device=device)
    loss = choose_loss(config.train.loss, one_label=True)
    engine = None
    if case.way == "timm":
        model = timm_network(case, config)
    else:
        model = VisionTransformer(spec, config.train.activation_checkpointing, config.train.compile)
        initialize(model, 0)
    if case.way == "engine":
        layout = batch_layout(rows, rows, 1)
        optimizer = build_optimizer(model, config.optimizer)
        engine = build_engine(model, optimizer, config.deepspeed, layout, config.optimizer.clip_norm)
        images = images.to(dtype)

        def step() -> None:
            accumulate(engine, loss(engine(images), labels, valid))
            update(engine, lr=1e-4)
    else:
        step = plainly(model.to(device), images, lambda logits: loss(logits, labels, valid), dtype)
    try:
        yield step
    finally:
        if engine is not None:
            release(engine)


def plainly(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Step:
    """A step as one writes it: autocast, DistributedDataParallel, clipping, torch's fused AdamW."""
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype):
            logits = parallel(images)
        loss(logits).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timm_network(case: Case, config: RunConfig) -> nn.Module:
    """timm's network of the same sizes, without the representation layer, which it does not have."""
    import timm

    spec = config.model.spec()
    sizes = {"img_size": spec.image_size, "embed_dim": spec.width, "depth": spec.layers, "num_heads": spec.heads}
    model: Any = timm.create_model(TIMM[case.config], num_classes=spec.num_classes, **sizes)
    for block in model.blocks if case.compiled else ():
        block.compile()
    return model


def measure(case: Case, world: World, toy: bool) -> dict[str, Any]:
    """Seconds of a step, MFU and memory."""
    config, device = read(case, toy), world.device
    dtype, spec = precision(config.deepspeed), config.model.spec()
    if toy:
        dtype = torch.bfloat16
        zero = config.deepspeed.model_copy(update={"bf16": config.deepspeed.bf16.model_copy(update={"enabled": True})})
        config = config.model_copy(update={"deepspeed": zero})
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    with stepping(case, config, world, dtype) as step:
        first = clock(step, 1, device)
        clock(step, 2, device)
        count = LEAST if toy else max(LEAST, int(ENOUGH / (clock(step, 2, device) / 2)))
        seconds = [clock(step, count, device) / count for _ in range(BLOCKS)]
        held = {kind: getattr(torch.cuda, f"max_memory_{kind}")() for kind in ("allocated", "reserved") if on_cuda}
        rate = product_rate(device, dtype, 256 if toy else 8192)
    del step
    torch._dynamo.reset()
    free_memory()
    median, flops, peak = statistics.median(seconds), training_flops(spec), peak_flops(device, dtype)
    found = {
        **asdict(case), "name": case.name, "first_step": first, "seconds": seconds,
        "images_per_second": case.micro_batch / median, "teraflops": case.micro_batch * flops / median / 1e12,
        "mfu": case.micro_batch * flops / median / peak if peak else None, "product_teraflops": rate / 1e12, **held,
    }  # fmt: skip
    if case.way == "engine":
        layout = batch_layout(case.micro_batch, case.micro_batch, 1)
        kind: Literal["cuda", "cpu"] = "cuda" if on_cuda else "cpu"
        planned = rank_memory(config.job(layout, dtype, device=kind, steps=None))
        found |= {"planned_allocated": planned.allocated, "planned_total": planned.total}
    return found


def clock(step: Step, count: int, device: torch.device) -> float:
    """The seconds of so many steps, from an idle device to an idle device."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square matrix product: what the device is up to at this moment."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    return 5 * 2 * side**3 / clock(lambda: torch.mm(left, right), 5, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu/steps.jsonl"))
    parser.add_argument("--seconds", type=float, default=240, help="for all cases; one begun is finished")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    began, world = time.monotonic(), processgroup.start()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as out:
        for case in cases(args.toy):
            if time.monotonic() > began + args.seconds:
                found: dict[str, Any] = {**asdict(case), "name": case.name, "left_out": "no time was left"}
            else:
                try:
                    found = measure(case, world, args.toy)
                except (torch.OutOfMemoryError, ImportError) as error:
                    found = {**asdict(case), "name": case.name, "left_out": str(error).splitlines()[0]}
                    free_memory()
            out.write(json.dumps({**found, "device": device_name(world.device)}) + "\n")
            out.flush()
            print(f"{time.monotonic() - began:5.0f} s  {case.name}: {found.get('seconds', found.get('left_out'))}")
    processgroup.stop()


if __name__ == "__main__":
    main()
