"""The last rank's gradient is not finite: what is left of the weights on every rank."""

import itertools
import json
import sys
from pathlib import Path

import torch

from pretrain.engine import processgroup
from pretrain.engine.engine import build_engine
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.quiet import get_accelerator
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.engine.step import accumulate, update
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

out, variants = Path(sys.argv[1]), json.loads(sys.argv[2])
world = processgroup.start()
get_accelerator().is_fp16_supported = lambda: True
spec = ViTSpec(patch_size=4, layers=2, width=16, mlp=32, heads=2, image_size=8, channels=1, num_classes=3)
told = {}
for name, section in variants.items():
    model = VisionTransformer(spec)
    initialize(model, 0)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))  # zero, it hides the rest
    optimizer = build_optimizer(model, OptimizerSection(lr=1.0, weight_decay=0.1, decay="all"))
    layout = batch_layout(4 * world.size, 2, world.size)
    engine = build_engine(model, optimizer, DeepSpeedSection(**section), layout, clip_norm=1.0)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(world.rank)).to(world.device)
    with torch.no_grad():
        outputs = [engine(images).float()]
    for poison in (False, True, False):
        for micro_batch in range(layout.accumulation):
            logits = engine(images)
            if poison and world.rank == world.size - 1 and micro_batch == 0:
                logits.register_hook(lambda gradient: gradient * float("nan"))
            accumulate(engine, logits.float().square().mean())
        update(engine, lr=1e-2)
        with torch.no_grad():
            outputs.append(engine(images).float())
    changed = [not torch.equal(before, after) for before, after in itertools.pairwise(outputs)]
    told[name] = {"changed": changed, "finite": bool(outputs[-1].isfinite().all())}
(out / f"{world.rank}.json").write_text(json.dumps(told))
processgroup.stop()
