"""Freezing, layer-wise learning rates, stochastic depth and half-precision momentum: the engine is a plain loop.

The loop knows neither DeepSpeed nor the engine's optimizers: every update is written out, parameter by parameter.
"""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain.checkpoint.pieces import Pieces
from pretrain.checkpoint.step import Checkpoint
from pretrain.configfile import read_config
from pretrain.engine.step import seed_step
from pretrain.images.transforms import TrainImages, to_float
from pretrain.index.index import Index
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer
from pretrain.ranks.collectives import World
from pretrain.stream.loader import LoaderOptions, TrainLoader
from pretrain.stream.order import Order
from pretrain.training.config import RunConfig
from pretrain.weights.load import load_weights
from tests.conftest import history

# Clipped at 0.5: most steps are, so a norm over other parameters than the trained ones would show.
STEPS, WARMUP, BATCH, DECAY, CLIP = 9, 2, 16, 0.1, 0.5
SCRIPT = Path(__file__).with_name("variants.py")
BF16 = "deepspeed.bf16.enabled=true"
SGD = ["optimizer.name=sgd", "optimizer.lr=0.03", "optimizer.momentum_dtype=bfloat16"]
LAYERS = 3


@pytest.fixture(scope="module")
def config_file(tiny_config, tmp_path_factory):
    return tiny_config(
        tmp_path_factory.mktemp("options") / "options.json",
        model={"layers": LAYERS, "width": 20, "mlp": 37, "heads": 2, "image_size": 16, "representation_size": 19},
        data={"flip": False, "crop_area": [0.6, 1.0]},
        train={"global_batch": BATCH, "steps": STEPS},
        optimizer={"lr": 3e-3, "weight_decay": DECAY, "clip_norm": CLIP, "averaging": {"decay": 0.9}},
        schedule={"warmup_steps": WARMUP, "decay": "constant"},
    )


def depth(name: str) -> int:
    """0 the embedding, then the blocks, the final norm, the head."""
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    return {"norm": LAYERS + 1, "representation": LAYERS + 2, "head": LAYERS + 2}.get(name.split(".")[0], 0)


def frozen(config: RunConfig) -> set[str]:
    """The names of the parameters that the config freezes."""
    freeze = config.train.freeze
    below = 0 if freeze is None else LAYERS + 2 if freeze == "body" else freeze + 1
    return {name for name, _ in VisionTransformer(config.model.spec()).named_parameters() if depth(name) < below}


def plain_loop(config: RunConfig, ranks: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    spec, optimizer = config.model.spec(), config.optimizer
    half = config.deepspeed.bf16.enabled, config.deepspeed.fp16.enabled
    dtype = {(True, False): torch.bfloat16, (False, True): torch.float16}.get(half, torch.float32)
    micro = config.train.micro_batch or BATCH // ranks
    accumulation = BATCH // ranks // micro
    model = VisionTransformer(spec)
    initialize(model, config.seed)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    still = frozen(config)
    model.to(dtype).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in still)
    for number, block in enumerate(model.blocks):
        block.train(f"blocks.{number}.norm1.bias" not in still)
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    index = Index.open(str(config.data.train))
    order = Order(index.samples, BATCH, config.seed)
    transform = TrainImages(spec.image_size, spec.channels, config.seed, config.data.crop_area, flip=False)
    options = [LoaderOptions(rank, ranks, workers=1) for rank in range(ranks)]
    loaders = [TrainLoader(index, order, transform, one, micro_batch=micro, stop_step=STEPS) for one in options]
    batches, curve = [iter(loader) for loader in loaders], []
    for step in range(STEPS):
        lr, total = optimizer.lr * min(1, step / WARMUP), 0.0
        sums: dict[str, torch.Tensor] = {}
        for rank in range(ranks):
            seed_step(config.seed, step, World(rank, ranks, rank, torch.device("cpu")))
            for batch in islice(batches[rank], accumulation):
                logits = model(to_float(batch.images, dtype)).float()
                loss = F.cross_entropy(logits, batch.labels[:, 0]) / accumulation
                model.zero_grad()
                loss.backward()
                total += loss.item() / ranks
                for name, parameter in model.named_parameters():
                    if name not in still:
                        sums[name] = sums.get(name, 0) + parameter.grad.float() / ranks
        norm = torch.stack([gradient.norm() for gradient in sums.values()]).norm()
        curve.append((total, norm.item()))
        for name, gradient in sums.items():
            gradient = gradient * min(1, CLIP / (norm.item() + 1e-6))
            scale = (optimizer.layer_decay or 1) ** (LAYERS + 1 - min(depth(name), LAYERS + 1))
            decay = DECAY if name.endswith("weight") and "norm" not in name else 0
            if optimizer.name == "sgd":
                velocity = 0.9 * first[name] + gradient + decay * weights[name]
                first[name] = velocity.bfloat16().float()
                weights[name] -= lr * scale * velocity
                continue
            weights[name] *= 1 - lr * scale * decay
            first[name] += 0.1 * (gradient - first[name])
            second[name] += 0.001 * (gradient**2 - second[name])
            corrected = [first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))]
            weights[name] -= lr * scale * corrected[0] / (corrected[1].sqrt() + 1e-8)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    for loader in loaders:
        loader.close()
    return curve


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


# Each option, and each value of `freeze`, under several stages and both precisions; accumulation and checkpointing too.
WAYS = {
    "body": [zero(0), "train.freeze=body"],
    "body, bf16": [zero(1), BF16, "train.freeze=body", "train.micro_batch=4"],
    "embedding": [zero(2), "train.freeze=0", "train.micro_batch=4", "train.activation_checkpointing=selective"],
    "blocks": [zero(3), "train.freeze=2", "train.micro_batch=4", "train.activation_checkpointing=full"],
    "blocks, layers": [zero(3), BF16, "train.freeze=1", "optimizer.layer_decay=0.5"],
    "all blocks, sgd": [zero(1), "train.freeze=3", *SGD],
    "layers": [zero(1), "optimizer.layer_decay=0.5", "train.freeze=0", "checkpoint.every=4", "checkpoint.keep=3"],
    "layers, sgd": [zero(2), BF16, "optimizer.layer_decay=0.8", *SGD],
    "sgd, paths": [zero(0), *SGD, "model.drop_path=0.5", "model.dropout=0.1"],
    "paths": [zero(2), "model.drop_path=0.6", "train.micro_batch=4", "train.activation_checkpointing=full"],
    "paths, blocks": [zero(3), "model.drop_path=0.6", "train.freeze=1", "train.micro_batch=4"],
}
OPTIMIZER, PARAMETERS = (
    f"deepspeed.zero_optimization.offload_{what}" + '={"device":"cpu"}' for what in ("optimizer", "param")
)
FP16 = ["deepspeed.fp16.enabled=true", "deepspeed.fp16.initial_scale_power=4"]
FURTHER = {
    "zero 1, offload": [zero(1), OPTIMIZER, "train.freeze=1"],
    "zero 2, offload": [zero(2), OPTIMIZER, "train.freeze=1", "train.micro_batch=4", *SGD],
    "zero 3, offload": [zero(3), BF16, OPTIMIZER, PARAMETERS, "train.freeze=body", "train.micro_batch=4", *SGD],
    "zero 1, fp16": [zero(1), *FP16, "train.freeze=1", "optimizer.layer_decay=0.5"],
    "zero 2, fp16": [zero(2), *FP16, "train.freeze=body", *SGD],
    "zero 3, fp16": [zero(3), *FP16, "train.freeze=1", "train.micro_batch=4"],
    "compiled": [zero(3), "train.compile=true", "train.freeze=1", "train.micro_batch=4", "model.drop_path=0.5"],
}
ALL = [zero(3), BF16, "train.freeze=1", "optimizer.layer_decay=0.8", "model.drop_path=0.5", "train.micro_batch=4", *SGD]


@pytest.fixture(scope="module")
def runs(ranks, config_file, tmp_path_factory):
    """A folder of runs on two ranks: one of each of WAYS, and ALL of them, also halted and resumed."""
    out = tmp_path_factory.mktemp("runs")
    ranks(2, SCRIPT, config_file, out, json.dumps({**WAYS, "through": ALL, "halted": ALL}))
    return out


@pytest.fixture(scope="module")
def further_runs(ranks, config_file, tmp_path_factory):
    """A folder of runs on two ranks, one of each of FURTHER."""
    out = tmp_path_factory.mktemp("further")
    ranks(2, SCRIPT, config_file, out, json.dumps(FURTHER))
    return out


def unlike(losses: list[tuple[int, float, float]], truths: list[tuple[float, float]], half: bool) -> list[int]:
    """The steps whose loss or gradient norm is not the plain loop's. Rounding of halves differs, and grows."""
    wrong = []
    for (step, loss, norm), (true_loss, true_norm) in zip(losses, truths, strict=True):
        allowed = ((1e-3, 5e-2) if step <= 6 else (5e-3, 0.2)) if half else (1e-5, 1e-4)
        if abs(loss / true_loss - 1) > allowed[0] or abs(norm / true_norm - 1) > allowed[1]:
            wrong.append(step)
    return wrong


@pytest.mark.parametrize("way", WAYS)
def test_each_option_is_the_plain_loop_and_what_is_frozen_stays_bit_for_bit(way, runs, config_file):
    check(runs / way, read_config(RunConfig, config_file, WAYS[way]))


@pytest.mark.long
@pytest.mark.parametrize("way", FURTHER)
def test_so_it_is_with_offload_in_fp16_and_compiled(way, further_runs, config_file):
    check(further_runs / way, read_config(RunConfig, config_file, FURTHER[way]))


def check(run: Path, config: RunConfig) -> None:
    """A run on two ranks is the plain loop, and of its weights and their average what is frozen is as it began."""
    losses = history(run).losses
    assert [step for step, _, _ in losses] == list(range(1, STEPS + 1))
    half = bool(config.deepspeed.bf16.enabled or config.deepspeed.fp16.enabled)
    assert unlike(losses, plain_loop(config, 2), half) == []
    began = VisionTransformer(config.model.spec())
    initialize(began, config.seed)
    raw, average = (load_weights(run, averaged=averaged).tensors for averaged in (False, True))
    for name, before in began.state_dict().items():
        same = [torch.equal(tensors[name], before) for tensors in (raw, average)]
        assert same == [name in frozen(config)] * 2, name


def test_each_option_changes_what_is_trained(runs):
    assert len({tuple(history(runs / way).losses) for way in WAYS}) == len(WAYS)


def test_a_run_with_all_options_resumes_bit_for_bit(runs):
    through, halted = history(runs / "through"), history(runs / "halted")
    assert halted.metrics == through.metrics
    assert {line["lr"] for line in through.metrics[WARMUP:]} == {0.03}, "the schedule's, not a layer's"
    assert load_weights(runs / "halted").sha256 == load_weights(runs / "through").sha256


def test_half_precision_momentum_is_in_the_checkpoint_as_it_is(runs):
    name, values = "blocks.2.mlp.fc1.weight", torch.empty(20 * 37)
    Pieces(Checkpoint.read(runs / "through" / "checkpoints" / f"step_{STEPS:08d}")).read(
        "momentum_buffer", name, values, 0
    )
    assert values.count_nonzero() == len(values)
    assert torch.equal(values, values.bfloat16().float())


def test_frozen_parameters_and_layers_of_their_own_rate_resume_under_another_stage(runs, ranks, config_file, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(runs / "layers", begun)
    shutil.rmtree(begun / "checkpoints" / f"step_{STEPS:08d}")
    changes = [zero(3), *WAYS["layers"][1:]]
    ranks(1, SCRIPT, config_file, tmp_path, json.dumps({"zero3": changes}), begun)
    config = read_config(RunConfig, config_file, changes)
    assert unlike(history(tmp_path / "zero3").losses, plain_loop(config, 1), half=False) == []
