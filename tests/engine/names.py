"""Engines that hold their weights under the right names, and under wrong ones: which of them are refused.

argv: where to write, {name: DeepSpeed section}, a config of a run that goes on under wrong names.
"""

import json
import sys
from pathlib import Path

from pretrain.configfile import read_config
from pretrain.engine import engine, fragments, processgroup
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.quiet import get_accelerator
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.errors import InputError
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.training.config import RunConfig
from pretrain.training.experiment import run

out, sections = Path(sys.argv[1]), json.loads(sys.argv[2])
world = processgroup.start()
get_accelerator().is_fp16_supported = lambda: True
# Odd sizes: pieces begin and end inside of parameters.
spec = ViTSpec(patch_size=4, layers=2, width=12, mlp=37, heads=2, image_size=8, channels=1, num_classes=3)


def read(section):
    """A section, with what a config is refused for too."""
    zero = dict(section["zero_optimization"])
    robin = {"round_robin_gradients": zero.pop("round_robin_gradients", False)}
    checked = DeepSpeedSection(**{**section, "zero_optimization": zero})
    return checked.model_copy(update={"zero_optimization": checked.zero_optimization.model_copy(update=robin)})


def built(section, *, filled=True):
    model = VisionTransformer(spec)
    if filled:
        initialize(model, 0)
    optimizer = build_optimizer(model, OptimizerSection(lr=1.0, weight_decay=0.1, decay="all"))
    layout = batch_layout(2 * world.size, 2, world.size)
    return engine.build_engine(model, optimizer, read(section), layout, 1.0)


def refusal(attempt):
    try:
        attempt()
    except InputError as error:
        return str(error)
    return None


told = {}
for name, section in sections.items():
    told[name] = refusal(lambda section=section: built(section))
    if "offload" not in name:
        told[f"{name}, unset"] = refusal(lambda section=section: built(section, filled=False))

whole = built({"zero_optimization": {"stage": 3}})
names = dict(whole.module.named_parameters())
places = [whole.optimizer.get_param_id(names[f"blocks.{block}.mlp.fc1.weight"]) for block in range(2)]
positions = whole.optimizer.grad_position
if world.rank == 1:  # that it refuses too where only the other rank is wrong
    positions[places[0]], positions[places[1]] = positions[places[1]], positions[places[0]]
told["two exchanged on rank 1"] = refusal(lambda: fragments.check_names(whole))

config = read_config(RunConfig, sys.argv[3])
assert run(config, out / "run", world) == 0
told_deepspeed = engine.deepspeed_config


def round_robin(*args):
    said = told_deepspeed(*args)
    return {**said, "zero_optimization": {**said["zero_optimization"], "round_robin_gradients": True}}


engine.deepspeed_config, engine.check_names = round_robin, lambda engine: None
longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
told["read back"] = refusal(lambda: run(longer, out / "run", world, extend=True))
(out / f"{world.rank}.json").write_text(json.dumps(told))
processgroup.stop()
