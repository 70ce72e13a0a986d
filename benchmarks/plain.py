"""Pre-training, fine-tuning and features as one writes them by hand: timm's network and a loop of plain PyTorch.

    python benchmarks/plain.py TASK.json

The peer of benchmarks/fashion.py, which writes the task: arrays of images, sizes, steps, hyper-parameters. One process
trains; DataLoader workers crop and flip. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]
FLOATS = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]


class Images(Dataset[tuple[Tensor, int]]):
    """uint8 images [n, rows, columns] and their labels, from a .npz file."""

    def __init__(self, path: str, transform: Transform) -> None:
        arrays = np.load(path)
        self.pixels, self.labels = torch.from_numpy(arrays["images"]), arrays["labels"]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(self.pixels[row][None]), int(self.labels[row])


def main() -> None:
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(task["seed"])
    started, results = time.perf_counter(), {}
    network = vit(task["network"], task["pretrain"]["size"])
    results["pretrain"] = train(network, task["pretrain"], adamw)
    network.eval()
    features(lambda images: network.forward_features(images)[:, 0], task["features"], task["pretrain"]["size"])
    network.set_input_size(img_size=task["finetune"]["size"])
    network.reset_classifier(task["network"]["num_classes"])
    nn.init.zeros_(network.head.weight)
    results["finetune"] = train(network, task["finetune"], sgd)
    results["seconds"] = time.perf_counter() - started
    Path(task["out"]).write_text(json.dumps(results))


def vit(sizes: dict[str, int], size: int) -> Any:
    """timm's ViT, initialised as the paper's authors do."""
    return timm.models.VisionTransformer(img_size=size, in_chans=1, weight_init="jax", **sizes)


def adamw(network: Any, task: dict[str, Any]) -> torch.optim.Optimizer:
    groups = param_groups_weight_decay(network, task["weight_decay"], no_weight_decay_list=network.no_weight_decay())
    return torch.optim.AdamW(groups, lr=task["lr"], betas=(0.9, 0.999), fused=True)


def sgd(network: Any, task: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=task["lr"], momentum=0.9)


def train(network: Any, task: dict[str, Any], optimizer: Callable[..., torch.optim.Optimizer]) -> dict[str, float]:
    """Train for `steps` steps; the accuracy afterwards, and the seconds of the loop."""
    size = task["size"]
    crop = v2.RandomResizedCrop(size, tuple(task["crop_area"]), antialias=True)
    data = Images(task["train"], v2.Compose([crop, v2.RandomHorizontalFlip(), *FLOATS]))
    loader = DataLoader(
        data, task["batch"], shuffle=True, drop_last=True, num_workers=task["workers"], persistent_workers=True
    )
    batches, update = endless(loader), optimizer(network, task)
    network.train()
    began = time.perf_counter()
    for step in range(task["steps"]):
        for group in update.param_groups:
            group["lr"] = task["lr"] * share(step, task)
        images, labels = next(batches)
        F.cross_entropy(network(images), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        update.step()
        update.zero_grad()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "top1": accuracy(network, task["test"], size)}


def endless(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[Any]:
    while True:
        yield from loader


def share(step: int, task: dict[str, Any]) -> float:
    """Of the learning rate: linear warm-up, then linear or cosine decay to 0."""
    if step < task["warmup"]:
        return step / task["warmup"]
    progress = (step - task["warmup"]) / (task["steps"] - task["warmup"])
    return 1 - progress if task["decay"] == "linear" else (1 + math.cos(math.pi * progress)) / 2


def centre(size: int) -> Transform:
    return v2.Compose([v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size), *FLOATS])


@torch.no_grad()
def accuracy(network: Any, test: str, size: int) -> float:
    network.eval()
    found = [(network(images).argmax(1) == labels) for images, labels in DataLoader(Images(test, centre(size)), 500)]
    return torch.cat(found).float().mean().item()


@torch.no_grad()
def features(class_token: Callable[[Tensor], Tensor], task: dict[str, str], size: int) -> None:
    """The class token after the final norm, of two sets of images, as `launch/fewshot.py --features` takes them."""
    arrays = {}
    for name in ("support", "query"):
        batches = list(DataLoader(Images(task[name], centre(size)), 500))
        arrays[f"{name}_x"] = torch.cat([class_token(images) for images, _ in batches]).numpy()
        arrays[f"{name}_y"] = torch.cat([labels for _, labels in batches]).numpy()
    np.savez(task["out"], **arrays)


if __name__ == "__main__":
    main()
