"""Which parameters decay, and what the engine is told."""

import pytest
import torch
from pydantic import ValidationError

from pretrain.engine.engine import deepspeed_config, precision
from pretrain.engine.layout import batch_layout
from pretrain.engine.optimizer import HalfMomentumSGD, build_optimizer, parameter_groups
from pretrain.engine.section import DeepSpeedSection, OptimizerSection
from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import VisionTransformer

SPEC = ViTSpec(patch_size=4, layers=2, width=8, mlp=16, heads=2, image_size=8, num_classes=3, representation_size=8)


def names(model: torch.nn.Module, group: dict) -> set[str]:
    held = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


def test_matrices_decay_and_nothing_else():
    model = VisionTransformer(SPEC)
    decayed, free = parameter_groups(model, 0.3, "matrices")
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    kernels = {"patch_embedding.weight", "representation.weight", "head.weight"}
    for block in range(2):
        kernels |= {
            f"blocks.{block}.{part}.weight" for part in ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")
        }
    assert names(model, decayed) == kernels
    assert names(model, free) == {name for name, _ in model.named_parameters()} - kernels
    assert {"class_token", "position_embedding", "norm.weight", "blocks.0.attention.qkv.bias"} <= names(model, free)


def test_all_decay_where_asked():
    (only,) = parameter_groups(VisionTransformer(SPEC), 0.3, "all")
    assert len(only["params"]) == len(list(VisionTransformer(SPEC).parameters()))


def test_layers_have_rates_of_their_own_as_in_beit():
    model = VisionTransformer(SPEC)
    scales = {}
    for group in parameter_groups(model, 0.3, "matrices", 0.5):
        scales |= dict.fromkeys(names(model, group), group["lr_scale"])
    assert scales.keys() == dict(model.named_parameters()).keys()
    wanted = {"blocks.0": 0.25, "blocks.1": 0.5, "norm": 1.0, "representation": 1.0, "head": 1.0}
    for name, scale in scales.items():
        part = name[:8] if name.startswith("blocks.") else name.split(".")[0]
        assert scale == wanted.get(part, 0.125), name


def test_groups_are_few_where_rates_are_the_same_and_the_frozen_one_is_not_decayed():
    model = VisionTransformer(SPEC, frozen=2)
    groups = parameter_groups(model, 0.3, "matrices")
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.3, 1.0), (0.0, 1.0), (0.0, 0.0)]
    frozen = {name for name, _ in model.named_parameters() if name.startswith(("patch", "class", "pos", "blocks.0"))}
    assert names(model, groups[2]) == frozen


def test_half_precision_momentum_rounds_what_is_stored_and_not_the_update(monkeypatch):
    monkeypatch.setattr("pretrain.engine.optimizer._CHUNK", 5)
    draws = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, generator=draws).requires_grad_()
    wanted, stored = weights.detach().clone(), torch.zeros(3, 4)
    optimizer = HalfMomentumSGD([{"params": [weights]}], lr=0.1, momentum=0.9, weight_decay=0.3)
    optimizer.allocate(weights)
    for _ in range(3):
        weights.grad = torch.randn(3, 4, generator=draws)
        velocity = 0.9 * stored + weights.grad + 0.3 * wanted
        wanted, stored = wanted - 0.1 * velocity, velocity.bfloat16().float()
        optimizer.step()
        torch.testing.assert_close(weights.detach(), wanted, rtol=1e-6, atol=1e-6)
    assert optimizer.state[weights]["momentum_buffer"].dtype == torch.bfloat16


@pytest.mark.parametrize("section", [{"name": "adamw"}, {"name": "sgd", "momentum": 0.0}])
def test_a_type_of_momentum_where_there_is_none_is_refused(section):
    with pytest.raises(ValidationError, match='momentum_dtype is "bfloat16", but there is no momentum of SGD'):
        OptimizerSection(lr=0.1, momentum_dtype="bfloat16", **section)


def test_fine_tuning_gets_sgd_with_momentum():
    optimizer = build_optimizer(VisionTransformer(SPEC), OptimizerSection(name="sgd", lr=0.1, weight_decay=0.3))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "cut"),
    [(4096, 32, 16, (32, 8)), (4096, None, 16, (256, 1)), (12, 2, 3, (2, 2)), (1, 1, 1, (1, 1))],
)
def test_a_batch_is_cut_into_equal_parts(batch, micro, ranks, cut):
    layout = batch_layout(batch, micro, ranks)
    assert (layout.micro_batch, layout.accumulation) == cut
    assert layout.per_rank * ranks == batch


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "right"), [(100, 8, 3, "96 or 120"), (10, None, 3, "9 or 12"), (4, 8, 1, "8 would")]
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(batch, micro, ranks, right):
    with pytest.raises(InputError, match=right):
        batch_layout(batch, micro, ranks)


def test_deepspeed_is_always_told_how_to_clip():
    config = deepspeed_config(DeepSpeedSection(zero_optimization={"stage": 2}), batch_layout(16, 4, 2), clip_norm=0.0)
    assert config["gradient_clipping"] == 0.0, "left out, DeepSpeed clips at 1"
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (16, 2)
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 50_000_000, "reduce_scatter": False}


def test_what_the_config_says_of_buckets_holds():
    section = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "reduce_scatter": True}}
    config = deepspeed_config(DeepSpeedSection(**section), batch_layout(16, 4, 2), clip_norm=0.0)
    assert config["zero_optimization"] == section["zero_optimization"]


def test_bf16_auto_is_fp32_on_the_cpu():
    zero = {"stage": 1}
    auto = DeepSpeedSection(bf16={"enabled": "auto"}, zero_optimization=zero)
    assert precision(auto) is torch.float32
    assert precision(DeepSpeedSection(bf16={"enabled": True}, zero_optimization=zero)) is torch.bfloat16
    assert deepspeed_config(auto, batch_layout(2, 1, 2), 1.0)["bf16"] == {"enabled": False}


def test_bf16_micro_batches_are_added_up_in_fp32():
    section = DeepSpeedSection(bf16={"enabled": True}, zero_optimization={"stage": 2})
    assert deepspeed_config(section, batch_layout(16, 4, 2), 1.0)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert deepspeed_config(section, batch_layout(16, 8, 2), 1.0)["data_types"] == {"grad_accum_dtype": "fp32"}
