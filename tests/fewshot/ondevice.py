"""Features and probes on this machine's device and on the CPU: how far apart they are. argv: the JSON file to write."""

import json
import sys
from pathlib import Path

import torch

from fewshot.probes.support import Support
from fewshot.probes.table import PROBES
from fewshot.score import fp64_device
from pretrain.engine import processgroup
from pretrain.model.arithmetic import exact_float32
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

CLASSES, SHOTS, WIDTH = 5, 8, 32
device = processgroup.start().device
probing = fp64_device(device)
told = {"device": str(device)}

spec = ViTSpec(patch_size=4, layers=2, width=48, mlp=96, heads=3, image_size=32, num_classes=10, representation_size=32)
model = VisionTransformer(spec).eval()
initialize(model, 0)
images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad(), exact_float32():
    host = model(images, features=True)
    there = model.to(device)(images.to(device), features=True)
told["features"] = {name: (there[name].cpu() - host[name]).abs().max().item() for name in host}

draw = torch.Generator().manual_seed(0)
labels = torch.arange(CLASSES).repeat(SHOTS)
means = torch.randn(CLASSES, WIDTH, generator=draw, dtype=torch.float64)
support = means[labels] + torch.randn(len(labels), WIDTH, generator=draw, dtype=torch.float64)
query = means.repeat(20, 1) + torch.randn(20 * CLASSES, WIDTH, generator=draw, dtype=torch.float64)
told["probes"] = {}
for name, probe in PROBES.items():
    scores = []
    for place in (probing, torch.device("cpu")):
        fitted = probe.fit(Support(support.to(place), labels.to(place), CLASSES), probe.l2 or 1024.0)
        scores.append(fitted.scores(query.to(place)).cpu())
    told["probes"][name] = ((scores[0] - scores[1]).abs().max() / scores[1].abs().max()).item()
Path(sys.argv[1]).write_text(json.dumps(told))
processgroup.stop()
