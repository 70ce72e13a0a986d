"""One of the ranks of test_memory.py: engines hold, to the byte, what the planner says. argv: few or all of them."""

import sys
from itertools import product

import torch

from benchmarks.memory import average_bytes, gradient_bytes, optimizer_bytes, parameter_bytes
from pretrain.checkpoint.section import CheckpointSection
from pretrain.engine import processgroup
from pretrain.engine.engine import build_engine, free_memory, release
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.engine.step import accumulate, update
from pretrain.model.initialization import initialize
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer
from pretrain.plan.job import Job
from pretrain.plan.memory.states import states
from pretrain.stream.section import DataSection
from pretrain.training.loss import softmax_loss

SPEC = ViTSpec(patch_size=4, layers=2, width=24, mlp=40, heads=2, image_size=8, num_classes=7)
OPTIMIZERS = [
    {"lr": 1e-3, "weight_decay": 0.1, "averaging": {"decay": 0.9}},
    {"lr": 1e-3, "name": "sgd", "momentum_dtype": "bfloat16", "layer_decay": 0.5},
]


def main() -> None:
    world = processgroup.start()
    for stage, half, options in product(range(4), (False, True), OPTIMIZERS):
        if half and stage == 0:
            continue
        # Of few, each stage meets both precisions and, but for 0, both optimizers; each precision both optimizers.
        if sys.argv[1] == "few" and options is not OPTIMIZERS[(stage + half) % 2]:
            continue
        frozen = 2 if "layer_decay" in options else 0
        zero = {
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 50}
        }
        section = DeepSpeedSection.model_validate({**zero, "bf16": {"enabled": True}} if half else zero)
        check(SPEC, frozen, OptimizerSection.model_validate(options), section, world.size)
    processgroup.stop()


def check(spec: ViTSpec, frozen: int, optimizer: OptimizerSection, section: DeepSpeedSection, ranks: int) -> None:
    """In and after two steps of two micro-batches."""
    dtype = torch.bfloat16 if section.bf16.enabled else torch.float32
    layout = batch_layout(4 * ranks, 2, ranks)
    parts = (spec, layout, dtype, "softmax", "none", False, frozen, optimizer, section)
    planned = states(Job(*parts, DataSection(), CheckpointSection(), None, "cpu"))
    model = VisionTransformer(spec, frozen=frozen)
    initialize(model, 0)
    engine = build_engine(model, build_optimizer(model, optimizer), section, layout, 1.0)
    engine.train()
    held = 0
    for _ in range(2):
        for _ in range(layout.accumulation):
            images, labels = torch.randn(2, 3, 8, 8, dtype=dtype), torch.randint(7, (2, 1))
            accumulate(engine, softmax_loss(engine(images), labels, torch.ones(2)))
            held = max(held, gradient_bytes(engine))
        update(engine, lr=1e-3, decay=0.9)
    found = (parameter_bytes(engine), held, optimizer_bytes(engine), average_bytes(engine))
    expected = (planned.parameters, planned.gradients, planned.optimizer, planned.average)
    case = f"ZeRO {section.stage}, {dtype}, {optimizer.name}, frozen below {frozen}"
    assert found == expected, f"{case}: found {found}, planned {expected}"
    release(engine)
    free_memory()


if __name__ == "__main__":
    sys.exit(main())
