"""A step and an inference of the network, beside the same network of other libraries.

    python benchmarks/step.py [--arch vit_ti_16] [--batch N] [--rounds 9] [--threads 1] [--compiled]
                              [--device cpu|cuda] [--dtype float32|bfloat16]

A step is forward, cross-entropy, backward, in training mode without dropout; no optimizer. Inference is forward in
evaluation mode without gradients. All networks have the same sizes, weights and images; their logits are compared
before anything is timed, and those that compute something else are named. In a round every contender is timed once,
in turn forwards and backwards, and beside each measurement the rate of bare matrix products of the network's own
shapes, which tells how fast the machine was then. Ratios are taken within a round.

--compiled: by torch.compile, as the users of each do it: of this project the blocks (`train.compile`), of the others
the network; for inference the network of all. Medians and spread; plot and JSON in runs/bench/.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers import PEERS
from benchmarks.products import Products, block_flops, timed
from benchmarks.strips import save_strips
from benchmarks.table import print_table, save, spread
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec, spec_from_arch
from pretrain.model.vit import VisionTransformer

OURS = "vit-foundry"
BATCHES = {"vit_ti_16": 16, "vit_h_14": 2}  # others: 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of logits, relative to the largest

Kind = str  # "step" or "inference"


@dataclass(frozen=True)
class Measured:
    """One measurement: its seconds, and the FLOP/s of bare matrix products just before."""

    seconds: float
    rate: float


@dataclass(frozen=True)
class Contender:
    """A network, how it is run for a step and for inference, and what is different in what it computes."""

    network: nn.Module
    trained: Callable[[Tensor], Tensor]
    inferred: Callable[[Tensor], Tensor]
    differs: str = ""

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def step(self, images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(self.trained(images), labels).backward()

    def infer(self, images: Tensor) -> None:
        with torch.no_grad():
            self.inferred(images)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    spec = spec_from_arch(args.arch)
    batch = args.batch or BATCHES.get(args.arch, 8)
    way = "compiled" if args.compiled else "eager"
    title = f"{args.arch}, {way}, {args.dtype}, {args.device}, batch {batch}, {args.threads} threads"
    contenders = build(spec, device, dtype, args.compiled)
    check(contenders, spec, device, dtype)
    found = measure(contenders, spec, batch, rounds=args.rounds, repeat=args.repeat)
    report(title, f"step_{args.arch}_{way}_{args.device}_{args.dtype}", vars(args), contenders, found, spec, batch)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_ti_16")
    parser.add_argument("--batch", type=int, help="images; by default 16 of Ti, 2 of H, 8 of others")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1, help="steps of a measurement; 10 or so on a GPU")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args()


def build(spec: ViTSpec, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Contender]:
    """All contenders that are installed, ours first, with the same weights."""
    ours = VisionTransformer(spec, compiled=compiled)
    initialize(ours, 0)
    assert ours.head is not None
    nn.init.normal_(ours.head.weight, std=0.02)  # it begins as zeros, which would hide what comes before
    ours.to(device, dtype)
    tensors = {name: tensor.detach() for name, tensor in ours.state_dict().items()}
    contenders = {OURS: Contender(ours, ours, torch.compile(ours) if compiled else ours)}
    for peer in PEERS:
        if peer.missing:
            print(f"{peer.name} is not installed; it is left out")
            continue
        network = peer.make(spec, tensors).to(device)
        run = torch.compile(network) if compiled else network
        contenders[peer.name] = Contender(network, run, run, peer.differs)
    return contenders


@torch.no_grad()
def check(contenders: Mapping[str, Contender], spec: ViTSpec, device: torch.device, dtype: torch.dtype) -> None:
    """End the benchmark where a network that is said to compute the same does not."""
    shape = (1, spec.channels, spec.image_size, spec.image_size)
    images = torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(1))
    wanted = contenders[OURS].network.eval()(images).float()
    for name, contender in contenders.items():
        apart = float((contender.network.eval()(images).float() - wanted).abs().max() / wanted.abs().max())
        if not contender.differs and not apart <= TOLERANCE[dtype]:
            sys.exit(
                f"{name}: with the same weights its logits differ by {apart:.1e} of the largest; nothing was timed"
            )


def measure(
    contenders: Mapping[str, Contender], spec: ViTSpec, batch: int, *, rounds: int, repeat: int = 1
) -> dict[Kind, dict[str, list[Measured]]]:
    """Time every contender once a round, after a round that warms up."""
    parameter = next(contenders[OURS].network.parameters())
    device, dtype = parameter.device, parameter.dtype
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, spec.channels, spec.image_size, spec.image_size, generator=generator).to(device, dtype)
    labels = torch.randint(spec.num_classes, (batch,), generator=generator).to(device)
    products = Products(spec, batch, device, dtype)
    found: dict[Kind, dict[str, list[Measured]]] = {
        kind: {name: [] for name in contenders} for kind in ("step", "inference")
    }
    for number in range(rounds + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            contender = contenders[name]
            for kind in found:
                contender.network.train(kind == "step")
                rate, seconds = products.rate(), 0.0
                for _ in range(repeat):
                    if kind == "step":
                        seconds += timed(lambda: contender.step(images, labels), device)  # noqa: B023
                        contender.network.zero_grad()
                    else:
                        seconds += timed(lambda: contender.infer(images), device)  # noqa: B023
                if number:
                    found[kind][name].append(Measured(seconds / repeat, rate))
    return found


def best_peer(found: Mapping[str, Sequence[Measured]]) -> tuple[str, list[float]]:
    """The peer with the least median, and its seconds over ours in each round; no peer: ours."""
    medians = {name: statistics.median(one.seconds for one in values) for name, values in found.items() if name != OURS}
    best = min(medians, key=medians.__getitem__, default=OURS)
    return best, [other.seconds / mine.seconds for other, mine in zip(found[best], found[OURS], strict=True)]


def report(
    title: str,
    name: str,
    arguments: dict[str, object],
    contenders: Mapping[str, Contender],
    found: Mapping[Kind, Mapping[str, Sequence[Measured]]],
    spec: ViTSpec,
    batch: int,
) -> None:
    """Tables, plot and JSON."""
    flops = spec.layers * block_flops(spec, batch)
    work = {"step": 3 * flops, "inference": flops}  # a backward pass takes two products for each of the forward's
    results: dict[str, object] = {}
    for kind, values in found.items():
        best, ratios = best_peer(values)
        rows = []
        for contender, measured in values.items():
            seconds, rates = [one.seconds for one in measured], [one.rate / 1e9 for one in measured]
            of_ours = [one.seconds / mine.seconds for one, mine in zip(measured, values[OURS], strict=True)]
            share = statistics.median(work[kind] / (one.seconds * one.rate) for one in measured)
            rows.append(
                (
                    contender,
                    *spread(seconds, ".3f"),
                    f"{statistics.median(of_ours):.3f}",
                    f"{share:.0%}",
                    *spread(rates),
                    f"{contenders[contender].parameters:,}",
                )
            )
        header = ("", "s", "low – high", "÷ ours", "of mm", "mm GFLOP/s", "low – high", "parameters")
        print_table(f"{kind}: {title}", header, rows)
        print(f"best peer {best}: ours is {' × as fast (median of rounds), '.join(spread(ratios, '.3f'))}")
        results[kind] = {
            "best_peer": best,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "measured": {each: [vars(one) for one in measured] for each, measured in values.items()},
        }
    for contender in contenders:
        if contenders[contender].differs:
            print(f"{contender} computes something else: {contenders[contender].differs}")
    print("of mm: the products of all blocks, at the rate of bare ones measured beside, over the time taken")
    save(name, {"arguments": arguments, "batch": batch, **results})
    panels: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for kind, values in found.items():
        for contender, measured in values.items():
            panels[f"seconds, {kind}"][contender] = [one.seconds for one in measured]
    save_strips(name, title, panels)


if __name__ == "__main__":
    main()
