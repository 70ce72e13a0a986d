"""What each way of computing the network gains: one network as it is, and with one thing done otherwise.

    python benchmarks/gains.py [--arch vit_ti_16] [--batch 16] [--rounds 15] [--threads 1] [--device cuda] [--dtype T]

Forward, cross-entropy and backward of the same weights on the same images, in turns, from round to round in another
order; the rate of bare matrix products beside each. The ratio is the time over that of the network as it is, in the
median of the rounds: above 1, what the network does is the faster way. JSON: runs/bench/gains_ARCH_DEVICE.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from benchmarks.products import Products, timed
from benchmarks.table import print_table, save, spread
from pretrain.model.block import Attention, Block
from pretrain.model.initialization import initialize
from pretrain.model.spec import spec_from_arch
from pretrain.model.vit import VisionTransformer


def whole_last_block(model: VisionTransformer) -> None:
    """The last block on all tokens, as every other block."""
    last = model.blocks[-1]
    last.forward = lambda x, class_only=False: Block.forward(last, x)


def last_k_and_v(model: VisionTransformer) -> None:
    """The last block's class token attends to k and v of all tokens, which one product makes."""
    attention = model.blocks[-1].attention

    def attend(x: Tensor) -> Tensor:
        width = x.shape[-1]
        (of_q, of_kv), (bias_q, bias_kv) = (
            one.split([width, 2 * width]) for one in (attention.qkv.weight, attention.qkv.bias)
        )
        k, v = F.linear(x, of_kv, bias_kv).chunk(2, dim=-1)
        q, k, v = (
            rearrange(one, "b n (heads e) -> b heads n e", heads=attention.heads)
            for one in (F.linear(x[:, :1], of_q, bias_q), k, v)
        )
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n e -> b n (heads e)")

    attention._first_token = attend


def qkv_at_once(model: VisionTransformer) -> None:
    """q, k and v brought into heads as one tensor, which copies it."""

    def attend(attention: Attention, x: Tensor, class_only: bool = False) -> Tensor:
        if class_only:
            return Attention.forward(attention, x, class_only)
        heads = attention.heads
        q, k, v = rearrange(attention.qkv(x), "b n (three heads e) -> three b heads n e", three=3, heads=heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return attention.dropout(attention.out(rearrange(x, "b heads n e -> b n (heads e)")))

    for block in model.blocks:
        block.attention.forward = partial(attend, block.attention)


def patches_by_convolution(model: VisionTransformer) -> None:
    """The patch embedding by the library's convolution, instead of one matrix product."""
    layer = model.patch_embedding

    def embed(images: Tensor) -> Tensor:
        found = F.conv2d(images, layer.weight, layer.bias, stride=layer.stride)
        return rearrange(found, "b d h w -> b (h w) d")

    layer.forward = embed


WAYS: dict[str, Callable[[VisionTransformer], None]] = {
    "as it is": lambda model: None,
    "last block on all tokens": whole_last_block,
    "last block's k and v": last_k_and_v,
    "q, k, v in one copy": qkv_at_once,
    "patches by a convolution": patches_by_convolution,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_ti_16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype, spec = torch.device(args.device), getattr(torch, args.dtype), spec_from_arch(args.arch)
    first = VisionTransformer(spec)
    initialize(first, 0)
    first.to(device, dtype)
    networks = {name: copy.deepcopy(first) for name in WAYS}
    for name, network in networks.items():
        WAYS[name](network)
    images = torch.randn(args.batch, spec.channels, spec.image_size, spec.image_size, device=device, dtype=dtype)
    labels = torch.randint(spec.num_classes, (args.batch,), device=device)
    wanted = first(images).detach()
    for name, network in networks.items():
        assert torch.allclose(network(images), wanted, atol=1e-4 if dtype is torch.float32 else 0.1), name

    def step(network: VisionTransformer) -> None:
        F.cross_entropy(network(images).float(), labels).backward()
        network.zero_grad()

    products = Products(spec, args.batch, device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    rates: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(args.rounds + 1):
        names = list(networks)[number % len(networks) :] + list(networks)[: number % len(networks)]
        for name in names if number % 2 else reversed(names):
            rate, taken = products.rate(), timed(partial(step, networks[name]), device)
            if number:  # the first round warms up
                rates[name].append(rate / 1e9)
                seconds[name].append(taken)
    base = seconds["as it is"]
    ratios = {name: [one / other for one, other in zip(found, base, strict=True)] for name, found in seconds.items()}
    rows = [
        (name, *spread(seconds[name], ".4f"), *spread(ratios[name], ".3f"), *spread(rates[name])) for name in networks
    ]
    header = ("", "s a step", "low – high", "× as it is", "low – high", "mm GFLOP/s", "low – high")
    print_table(f"{args.arch}, {args.dtype}, {args.device}, {args.batch} images", header, rows)
    medians = {name: statistics.median(found) for name, found in ratios.items()}
    save(f"gains_{args.arch}_{args.device}", {"arguments": vars(args), "seconds": seconds, "ratios": medians})


if __name__ == "__main__":
    main()
