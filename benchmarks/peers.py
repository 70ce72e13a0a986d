"""The same Vision Transformer by other libraries, with this project's weights in it.

Where the library allows, its parameters are views of ours: all networks together take the memory of one, so that the
largest can be compared on a small host. Gradients are a network's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import literal
from pretrain.model.spec import ViTSpec
from pretrain.weights.formats.table import Row, to_file
from pretrain.weights.read import FORMATS

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """A network of another library.

    Args:
        name: for people.
        needs: the module to be installed.
        make: the network of a spec, given our tensors by our names.
        differs: what it computes differently, in words; empty: its logits are ours.
    """

    name: str
    needs: str
    make: Callable[[ViTSpec, Tensors], nn.Module]
    differs: str = ""

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.needs) is None


class _Logits(nn.Module):
    """Of a network that returns more."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).logits
        return logits


def _shared(network: nn.Module, rows: Sequence[Row], spec: ViTSpec, tensors: Tensors) -> nn.Module:
    """`network`, built without memory, with views of our tensors as its parameters."""
    network.load_state_dict({row.name: to_file(row, tensors, spec) for row in rows}, assign=True)
    return network


def _literal(spec: ViTSpec, tensors: Tensors) -> nn.Module:
    with torch.device("meta"):
        network = literal.LiteralViT(spec)
    return _shared(network, literal.rows(spec), spec, tensors)


def _timm(spec: ViTSpec, tensors: Tensors) -> nn.Module:
    from timm.models import VisionTransformer

    with torch.device("meta"):
        network = VisionTransformer(
            img_size=spec.image_size,
            patch_size=spec.patch_size,
            in_chans=spec.channels,
            num_classes=spec.num_classes,
            embed_dim=spec.width,
            depth=spec.layers,
            num_heads=spec.heads,
            mlp_ratio=spec.mlp / spec.width,
        )
    return _shared(network, FORMATS["timm"].rows(spec), spec, tensors)


def _torchvision(spec: ViTSpec, tensors: Tensors) -> nn.Module:
    from torchvision.models import VisionTransformer

    with torch.device("meta"):
        network = VisionTransformer(
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            num_layers=spec.layers,
            num_heads=spec.heads,
            hidden_dim=spec.width,
            mlp_dim=spec.mlp,
            num_classes=spec.num_classes,
        )
    return _shared(network, FORMATS["torchvision"].rows(spec), spec, tensors)


def _transformers(spec: ViTSpec, tensors: Tensors) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = ViTConfig(
        hidden_size=spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        intermediate_size=spec.mlp,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=spec.norm_eps,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        num_channels=spec.channels,
        num_labels=spec.num_classes,
    )
    held = {row.name: to_file(row, tensors, spec) for row in FORMATS["hf"].rows(spec)}
    dtype = next(iter(tensors.values())).dtype
    # Only this renames tensors between the library's generations; it copies them.
    return _Logits(
        ViTForImageClassification.from_pretrained(
            None, config=config, state_dict=held, attn_implementation="sdpa", dtype=dtype
        )
    )


def _vit_pytorch(spec: ViTSpec, tensors: Tensors) -> nn.Module:
    from vit_pytorch import ViT

    network = ViT(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        channels=spec.channels,
        num_classes=spec.num_classes,
        dim=spec.width,
        depth=spec.layers,
        heads=spec.heads,
        dim_head=spec.width // spec.heads,
        mlp_dim=spec.mlp,
    )
    return network.to(next(iter(tensors.values())).dtype)


PEERS = [
    Peer("timm", "timm", _timm),
    Peer("torchvision", "torchvision", _torchvision),
    Peer("Hugging Face", "transformers", _transformers),
    Peer("vit-pytorch", "vit_pytorch", _vit_pytorch, "no bias of q, k, v; a norm before and after the patch embedding"),
    Peer("literal", "torch", _literal),
]
