import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.model.depth import frozen_depth
from pretrain.model.spec import spec_from_arch
from pretrain.model.vit import VisionTransformer
from pretrain.plan.flops import forward_macs, macs_by_part, training_flops


@pytest.mark.parametrize(
    ("arch", "fields", "giga"),
    [
        ("vit_b_16", {}, 17.6),
        ("vit_l_16", {}, 61.6),
        ("vit_l_16", {"patch_size": 14}, 81.0),
        ("vit_h_14", {}, 167.3),
    ],
)
def test_multiply_adds_are_the_published_ones(arch, fields, giga):
    assert round(forward_macs(spec_from_arch(arch, **fields)) / 1e9, 1) == giga


def spared(spec):
    """Multiply-adds of the last block that the logits do not need: all products but those of the class token.

    Beyond a token's products with all weights it has, for each head, scores and values as wide as the tokens.
    """
    if spec.pool != "cls":
        return 0
    n, d = spec.tokens, spec.width
    token = 4 * d * d + 2 * d * spec.mlp
    return (n - 1) * token + 2 * n * n * d - 2 * spec.heads * n * d


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("vit_h_14", {"representation_size": 1280}),
        ("vit_b_16", {}),
        ("vit_ti_16", {"pool": "mean", "positions": "sincos2d", "channels": 1}),
        ("vit_s_16", {"image_size": 250, "num_classes": 7, "representation_size": 96}),
    ],
)
def test_multiply_adds_are_those_torch_counts(arch, fields):
    spec = spec_from_arch(arch, **fields)
    with torch.device("meta"):
        model, batch = (
            VisionTransformer(spec),
            torch.empty(3, spec.channels, spec.image_size, spec.image_size),
        )
    with FlopCounterMode(display=False) as counter:
        model(batch)
    assert counter.get_total_flops() == 2 * 3 * (forward_macs(spec) - spared(spec))


def test_a_training_step_is_six_operations_per_multiply_add():
    spec = spec_from_arch("vit_b_16", representation_size=768)
    parts = macs_by_part(spec)
    assert training_flops(spec) == 6 * sum(parts.values())
    assert parts["head"] == 768 * 768 + 768 * 1000


@pytest.mark.parametrize("freeze", [0, 1, 3, "body"])
def test_the_backward_pass_of_what_is_frozen_is_not_counted(freeze):
    spec = spec_from_arch("vit_ti_16", layers=3, representation_size=96)
    frozen = frozen_depth(freeze, spec.layers)
    with torch.device("meta"):
        model, batch = VisionTransformer(spec, frozen=frozen), torch.empty(2, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    spared_flops = (2 if frozen > spec.layers else 6) * spared(spec)
    assert counter.get_total_flops() == 2 * (training_flops(spec, frozen) - spared_flops)
