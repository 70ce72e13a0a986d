"""What one image costs: multiply-adds of the forward pass, operations of a training step.

The network's are counted whole, as is usual for MFU and in published figures. For the logits of a network with a class
token the last block computes products of that token alone and its scores with the others, so less is executed: nearly a
block, 8 % of the whole in 12 blocks and 3 % in 32. A measured MFU holds that gain.
"""

from pretrain.model.spec import ViTSpec


def macs_by_part(spec: ViTSpec) -> dict[str, int]:
    """Multiply-adds of one image's forward pass, by part: products alone, as usual; no norms or softmax."""
    n, d, layers = spec.tokens, spec.width, spec.layers
    representation = spec.representation_size or 0
    return {
        "patch_embedding": spec.grid**2 * spec.channels * spec.patch_size**2 * d,
        "qkv": layers * n * 3 * d * d,
        "scores": layers * n * n * d,
        "values": layers * n * n * d,
        "out": layers * n * d * d,
        "mlp": layers * n * 2 * d * spec.mlp,
        "head": d * representation + (representation or d) * spec.num_classes,
    }


def forward_macs(spec: ViTSpec) -> int:
    """Multiply-adds of one image's forward pass (B/16 at 224 px: 17.6 G)."""
    return sum(macs_by_part(spec).values())


def training_flops(spec: ViTSpec, frozen: int = 0) -> int:
    """Floating-point operations of one image's forward and backward pass.

    Two per multiply-add, and the backward pass takes two products for each of the forward's, but none for what lies
    below the depth `frozen` (`model.depth`). Blocks computed again for activation checkpointing are not counted: this
    is the work the model needs, MFU's numerator.
    """
    parts = macs_by_part(spec)
    blocks = sum(macs for name, macs in parts.items() if name not in ("patch_embedding", "head"))
    fixed = blocks * min(max(frozen - 1, 0), spec.layers) // spec.layers
    if frozen:
        fixed += parts["patch_embedding"]
    return 6 * forward_macs(spec) - 4 * fixed
