"""Engines that hold weights and gradients once, beside those that hold them as DeepSpeed does: what each trains.

argv: where to write, {name: [ZeRO section, frozen]}, {name: ZeRO section} of what is only built.
"""

import json
import sys
from pathlib import Path

import torch

from pretrain.engine import engine as building
from pretrain.engine import processgroup
from pretrain.engine.fragments import held, kinds
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.engine.step import accumulate, update
from pretrain.engine.zero.once import hold_once
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

out, sections, only_built = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
world = processgroup.start()
# Odd sizes: pieces begin and end inside of parameters.
spec = ViTSpec(patch_size=4, layers=3, width=12, mlp=37, heads=2, image_size=8, channels=1, num_classes=3)


def built(section, hold, frozen):
    """An engine; whether its optimizer's weights are the network's."""
    building.hold_once = hold
    model = VisionTransformer(spec, frozen=frozen)
    initialize(model, 0)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))  # zero, it hides the rest
    optimizer = build_optimizer(model, OptimizerSection(lr=0.1, weight_decay=0.1, layer_decay=0.9))
    layout = batch_layout(4 * world.size, 2, world.size)
    engine = building.build_engine(model, optimizer, DeepSpeedSection(zero_optimization=section), layout, clip_norm=0.5)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return engine, {flat.untyped_storage().data_ptr() for flat in optimizer.state} <= weights


def trained(engine):
    """Norms and final values of four steps, of which one is held back."""
    generator = torch.Generator().manual_seed(world.rank)
    norms = []
    for step in range(4):
        for _ in range(2):
            logits = engine(torch.randn(2, 1, 8, 8, generator=generator))
            accumulate(engine, logits.square().mean())
        norms.append(update(engine, lr=0.1, refused="a test" if step == 1 else None).grad_norm)
    return norms, [part.view(engine.basic_optimizer, kind) for part in held(engine) for kind in kinds(engine)]


told = {}
for name, (section, frozen) in sections.items():
    ours, shared = built(section, hold_once, frozen)
    norms, values = trained(ours)
    theirs, not_shared = built(section, lambda engine: False, frozen)
    expected, kept = trained(theirs)
    told[name] = {
        "once": shared and not not_shared,
        "norms": norms == expected and len(set(norms)) == 4,
        "values": all(map(torch.equal, values, kept)) and len(values) == len(kept) > 0,
    }
for name, section in only_built.items():
    told[name] = {"once": built(section, hold_once, 0)[1]}
(out / f"{world.rank}.json").write_text(json.dumps(told))
processgroup.stop()
