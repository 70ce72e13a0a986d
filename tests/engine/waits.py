"""Where the host reads numbers of the device during a step.

argv: where to write, {name: DeepSpeed section}.

Nothing tells the CPU's memory from the host's, so numbers that come from the host are marked by their type, which what
is computed from them keeps.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch

from pretrain.engine import processgroup
from pretrain.engine.engine import build_engine
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.quiet import get_accelerator
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.engine.step import accumulate, agree, update
from pretrain.engine.zero import norm
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

READS = "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"
seen: Counter[str] = Counter()


class OfHost(torch.Tensor):
    """A number that the host has."""


def counted(name):
    read = getattr(torch.Tensor, name)

    def reading(self, *args, **kwargs):
        if not isinstance(self, OfHost):
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            seen[f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}"] += 1
        return read(self, *args, **kwargs)

    return reading


out, sections = Path(sys.argv[1]), json.loads(sys.argv[2])
world = processgroup.start()
get_accelerator().is_fp16_supported = lambda: True
spec = ViTSpec(patch_size=4, layers=2, width=16, mlp=32, heads=2, image_size=8, channels=1, num_classes=3)
make, norm._on_host = norm._on_host, lambda *given: make(*given).as_subclass(OfHost)
told = {}
for name, section in sections.items():
    model = VisionTransformer(spec)
    initialize(model, 0)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))  # zero, it hides the rest
    optimizer = build_optimizer(model, OptimizerSection(lr=0.1))
    layout = batch_layout(4 * world.size, 2, world.size)
    engine = build_engine(model, optimizer, DeepSpeedSection(**section), layout, clip_norm=0.01)
    own = {read: getattr(torch.Tensor, read) for read in READS}
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(world.rank))
    for step in range(3):
        seen.clear()
        for read in READS:
            setattr(torch.Tensor, read, counted(read))
        for _ in range(layout.accumulation):
            loss = engine(images).float().square().mean()
            accumulate(engine, loss)
        agreed = agree(world, loss, False, norm=norm.gradient_norm(engine))
        made = update(engine, lr=0.1, norm=agreed.norm)
        for read, function in own.items():
            setattr(torch.Tensor, read, function)
        assert made.skipped is None, (name, step)
        assert made.grad_norm > 0.01, "it is not clipped"
    told[name] = dict(seen)
(out / f"{world.rank}.json").write_text(json.dumps(told))
processgroup.stop()
