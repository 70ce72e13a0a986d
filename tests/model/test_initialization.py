import math

import pytest
import torch
from scipy.stats import truncnorm
from torch import nn

from pretrain.model import initialization
from pretrain.model.initialization import initialize
from pretrain.model.vit import VisionTransformer


@pytest.fixture(scope="module")
def model(tiny):
    """Wide enough for its statistics to be sharp: each matrix holds 65,536 values or more."""
    spec = tiny(width=256, mlp=1024, layers=2, heads=4, image_size=128, patch_size=16, representation_size=512)
    model = VisionTransformer(spec)
    initialize(model, 1, head_bias=-10.0)
    return model


def is_uniform(values, bound):
    """Within ±bound, reaching it to 1 %, with the deviation bound/√3 to 2 %."""
    values = values.detach()
    return (
        float(values.abs().max()) == pytest.approx(bound, rel=0.01)
        and float(values.abs().max()) <= bound
        and float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        and abs(float(values.mean())) < 0.02 * bound
    )


def test_every_parameter_is_filled(model):
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_q_k_v_and_out_are_each_xavier_uniform_on_their_own_matrix(model):
    bound = math.sqrt(6 / (256 + 256))
    for block in model.blocks:
        parts = [*block.attention.qkv.weight.chunk(3), block.attention.out.weight]
        assert all(is_uniform(part, bound) for part in parts)
        assert not block.attention.qkv.bias.any()
        assert not block.attention.out.bias.any()


def test_fused_qkv_is_three_xavier_matrices_bit_for_bit():
    fused = nn.Linear(96, 3 * 96)
    with torch.no_grad():
        initialization.attention_in(fused, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    parts = [nn.init.xavier_uniform_(torch.empty(96, 96), generator=generator) for _ in "qkv"]
    assert torch.equal(fused.weight, torch.cat(parts))


def test_mlp_is_xavier_uniform_with_biases_of_a_millionth(model):
    for block in model.blocks:
        for layer in (block.mlp.fc1, block.mlp.fc2):
            assert is_uniform(layer.weight, math.sqrt(6 / (256 + 1024)))
            assert float(layer.bias.detach().std()) == pytest.approx(1e-6, rel=0.2)


def test_truncated_normal_has_the_deviation_asked_for_after_its_cut():
    assert pytest.approx(truncnorm(-2, 2).std(), abs=1e-12) == initialization.STD_CUT_AT_2
    layer = nn.Conv2d(3, 4096, 16)
    with torch.no_grad():
        initialization.lecun(layer, torch.Generator().manual_seed(0))
    std = 1 / math.sqrt(3 * 16 * 16)
    # 3.1 M values: the sample deviation itself is known to 3e-4.
    assert float(layer.weight.detach().double().std()) == pytest.approx(std, rel=1e-3)
    assert float(layer.weight.detach().abs().max()) == pytest.approx(2 * std / 0.87963, rel=1e-3)


def test_patches_and_representation_are_lecun_normal_with_zero_bias(model):
    for layer, fan_in in ((model.patch_embedding, 3 * 16 * 16), (model.representation, 256)):
        assert float(layer.weight.detach().std()) == pytest.approx(1 / math.sqrt(fan_in), rel=0.01)
        assert not layer.bias.any()


def test_tokens_norms_and_head_start_as_the_paper_has_them(model):
    assert not model.class_token.any()
    assert float(model.position_embedding.detach().std()) == pytest.approx(0.02, rel=0.03)
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            assert norm.weight.eq(1).all()
            assert not norm.bias.any()
    assert not model.head.weight.any()
    assert model.head.bias.eq(-10).all()


def test_head_bias_is_zero_unless_given(tiny):
    model = VisionTransformer(tiny())
    initialize(model, 0)
    assert not model.head.bias.any()


def test_a_seed_gives_the_same_values_whatever_was_drawn_before(tiny):
    states = []
    for torch_seed, seed in ((1, 4), (2, 4), (2, 5), (3, torch.Generator().manual_seed(4))):
        torch.manual_seed(torch_seed)
        model = VisionTransformer(tiny())
        initialize(model, seed)
        states.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[3])
    assert not torch.equal(states[0], states[2])


def test_values_in_bf16_are_those_of_fp32_rounded(tiny):
    full, half = VisionTransformer(tiny()), VisionTransformer(tiny()).bfloat16()
    initialize(full, 4)
    initialize(half, 4)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(full.parameters(), half.parameters(), strict=True))


def test_no_two_matrices_are_drawn_alike(model):
    first, second = model.blocks
    q, k, v = first.attention.qkv.weight.chunk(3)
    for a, b in ((q, k), (k, v), (first.attention.out.weight, second.attention.out.weight)):
        assert not torch.equal(a, b)


def test_partitioned_parameters_are_gathered_one_module_at_a_time(tiny, partitioned):
    spec = tiny(representation_size=12)
    whole, parted = VisionTransformer(spec), VisionTransformer(spec)
    initialize(whole, 2)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in whole.modules())
    store, gathered = partitioned(parted)
    initialize(parted, 2, gathered=gathered)
    assert all(torch.equal(tensor, store[name]) for name, tensor in whole.state_dict().items())
    assert gathered.largest == largest
