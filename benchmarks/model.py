"""Forward and backward seconds of the network against timm's of the same size.

    python benchmarks/model.py [--rounds 15] [--batch 8]

ViT-Ti/16, 224 px, fp32, one thread, interleaved; medians and spread. JSON beside it: runs/bench/model.json.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import statistics
import time

import timm
import torch

from pretrain.model.initialization import initialize
from pretrain.model.spec import spec_from_arch
from pretrain.model.vit import VisionTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours = VisionTransformer(spec_from_arch("vit_ti_16"))
    initialize(ours, 0)
    networks = {"vit-foundry": ours, "timm": timm.create_model("vit_tiny_patch16_224")}
    images = torch.randn(args.batch, 3, 224, 224)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for number in range(args.rounds + 1):
        for name, network in networks.items():
            began = time.perf_counter()
            network(images).float().square().mean().backward()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
            network.zero_grad()
    print(f"{'network':12} seconds   low – high")
    for name, found in seconds.items():
        print(f"{name:12} {statistics.median(found):7.3f}   {min(found):.3f} – {max(found):.3f}")
    print(f"ratio of medians {statistics.median(seconds['vit-foundry']) / statistics.median(seconds['timm']):.3f}")
    out = Path("runs/bench/model.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"seconds": seconds, "batch": args.batch}, indent=1))
    print(f"\n{out}")


if __name__ == "__main__":
    main()
