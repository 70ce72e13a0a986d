"""Initial values of a VisionTransformer's parameters, as the Flax original draws them.

One function per kind of module. Values are drawn in fp32 on the generator's device (the CPU, unless one is
given that lies elsewhere) and copied: a seed gives the same weights on every device and, up to rounding, in
any type.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pretrain.model.vit import Gathered, VisionTransformer, materialised

# Standard deviation of a unit normal cut at ±2: dividing by it makes that of the cut one what was asked for.
STD_CUT_AT_2 = 0.8796256610342398


def initialize(
    model: VisionTransformer,
    seed: int | Generator,
    *,
    head_bias: float = 0.0,
    gathered: Gathered = nullcontext,
) -> None:
    """Fill every parameter of a materialised model, in place; the same seed gives the same values.

    head_bias: bias of the classification layer: 0 for softmax; for the sigmoid loss the logit of a class's
    prior, -10 on ImageNet-21k and JFT, -6.9 (1/1000) on ImageNet-1k.
    gathered: where parameters are partitioned, called with one module's own parameters at a time: a context
    manager inside which they are whole, and which puts back what rank 0 wrote
    (`deepspeed.zero.GatheredParameters` with `modifier_rank=0`).
    Raises RuntimeError on the meta device.
    """
    generator = seed if isinstance(seed, Generator) else Generator().manual_seed(seed)
    fills: dict[str, Callable[[Any, Generator], None]] = {
        "": tokens,
        "patch_embedding": lecun,
        "norm1": norm,
        "qkv": attention_in,
        "out": attention_out,
        "norm2": norm,
        "fc1": mlp,
        "fc2": mlp,
        "norm": norm,
        "representation": lecun,
        "head": partial(head, bias=head_bias),
    }
    for name, module in model.named_modules():
        own = materialised(module.parameters(recurse=False))
        if own:
            with torch.no_grad(), gathered(own):
                fills[name.rpartition(".")[2]](module, generator)


def tokens(model: VisionTransformer, generator: Generator) -> None:
    """Class token 0, learned positions N(0, 0.02)."""
    for name, parameter in model.named_parameters(recurse=False):
        if name == "class_token":
            parameter.zero_()
        else:
            draw(parameter, partial(nn.init.normal_, std=0.02), generator)


def lecun(layer: nn.Linear | nn.Conv2d, generator: Generator) -> None:
    """Patch convolution, representation: LeCun's truncated normal, std 1/√fan_in after the cut; bias 0."""
    fan_in = math.prod(layer.weight.shape[1:])
    std = 1 / math.sqrt(fan_in) / STD_CUT_AT_2
    draw(layer.weight, partial(nn.init.trunc_normal_, std=std, a=-2 * std, b=2 * std), generator)
    if layer.bias is not None:
        layer.bias.zero_()


def attention_in(layer: nn.Linear, generator: Generator) -> None:
    """q, k, v: Xavier-uniform, each on its own d×d matrix (on the fused 3d×d it is √2 too narrow); bias 0."""
    for part in layer.weight.chunk(3):
        draw(part, nn.init.xavier_uniform_, generator)
    if layer.bias is not None:
        layer.bias.zero_()


def attention_out(layer: nn.Linear, generator: Generator) -> None:
    """Attention output: Xavier-uniform, bias 0."""
    draw(layer.weight, nn.init.xavier_uniform_, generator)
    layer.bias.zero_()


def mlp(layer: nn.Linear, generator: Generator) -> None:
    """Either layer of an MLP: Xavier-uniform, bias N(0, 1e-6)."""
    draw(layer.weight, nn.init.xavier_uniform_, generator)
    draw(layer.bias, partial(nn.init.normal_, std=1e-6), generator)


def norm(layer: nn.LayerNorm, generator: Generator) -> None:
    """Scale 1, bias 0."""
    layer.weight.fill_(1)
    layer.bias.zero_()


def head(layer: nn.Linear, generator: Generator, *, bias: float) -> None:
    """Classification layer: kernel 0, every class starts from `bias`."""
    layer.weight.zero_()
    layer.bias.fill_(bias)


def draw(target: Tensor, fill: Callable[..., Tensor], generator: Generator) -> None:
    """Copy into `target` what `fill(tensor, generator=…)` draws for its shape."""
    values = torch.empty(target.shape, dtype=torch.float32, device=generator.device)
    target.copy_(fill(values, generator=generator))
