"""The Vision Transformer of "An Image is Worth 16x16 Words", and how given tensors are put into one.

Axes: b images, c channels, h rows, w columns (of pixels or patches), n tokens, d width, k classes.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import InputError
from pretrain.model.block import Block, Checkpointing, Linear, encoders
from pretrain.model.positions import sincos2d
from pretrain.model.spec import ViTSpec

# Where parameters are partitioned (ZeRO-3): a context manager inside which these are whole and writable.
Gathered = Callable[[list[nn.Parameter]], AbstractContextManager[object]]


class PatchEmbedding(nn.Conv2d):
    """Patches of p × p pixels, each times one matrix: [b, c, h, w] → [b, n, d], patches row by row.

    A convolution whose stride is its kernel, as one matrix product: its weight has a convolution's shape, [d, c, p, p].
    As there, rows and columns beyond the last whole patch are ignored.
    """

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__(spec.channels, spec.width, kernel_size=spec.patch_size, stride=spec.patch_size)
        self.pixels = spec.grid * spec.patch_size

    def forward(self, images: Tensor) -> Tensor:
        p, q = self.kernel_size
        patches = rearrange(images[..., : self.pixels, : self.pixels], "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        return F.linear(patches, self.weight.flatten(start_dim=1), self.bias)


class VisionTransformer(nn.Module):
    """The network of a ViTSpec. Its parameters are unset (NaN) until `initialize` or `load_tensors` has run.

    Fixed sine-cosine positions are computed in forward (a few small kernels): they are then neither parameter
    nor buffer: nothing to save, load, resize, partition or, after building on the meta device, fill.

    Args:
        checkpointing: what of each block is computed again in the backward pass rather than kept; k: every k-th block.
        compiled: torch.compile the blocks for training: one graph, which all of them share.
        frozen: the depth (`model.depth`) below which nothing is trained: there the network is a fixed function, without
            dropout or drop path, whose activations are not kept.

    Raises:
        InputError: checkpointing every k-th block of fewer than k.
    """

    def __init__(
        self, spec: ViTSpec, checkpointing: Checkpointing = "none", compiled: bool = False, frozen: int = 0
    ) -> None:
        super().__init__()
        self.spec, self.frozen = spec, frozen
        learned, class_token = spec.positions == "learned", spec.pool == "cls"
        self.patch_embedding = PatchEmbedding(spec)
        self.class_token = nn.Parameter(torch.empty(1, 1, spec.width)) if class_token else None
        self.position_embedding = nn.Parameter(torch.empty(1, spec.tokens, spec.width)) if learned else None
        self.dropout = nn.Dropout(spec.dropout)
        ways = zip(encoders(spec, checkpointing, compiled), spec.drop_paths, strict=True)
        self.blocks = nn.ModuleList(Block(spec, *way) for way in ways)
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        size = spec.representation_size
        self.representation = Linear(spec.width, size) if size else None
        self.head = Linear(size or spec.width, spec.num_classes) if spec.num_classes else None

    def forward(self, images: Tensor, features: bool = False) -> Tensor | dict[str, Tensor]:
        """images: float [b, c, h, w] in [-1, 1], h = w = spec.image_size. Returns logits [b, k]; without a
        classification layer, what would go into it.

        With `features`, returns instead a dict of [b, ·]: "cls" (class token after the final norm; the mean
        where there is none), "mean" (patch tokens after the final norm, averaged) and, with a representation
        head, "pre_tanh" and "tanh".

        Raises InputError where the images are not of the model's size.
        """
        parts = [self.embed, *self.blocks]
        if self.spec.pool == "cls" and not features:  # nothing else of the last block's output is read
            parts[-1] = partial(self.blocks[-1], class_only=True)
        x = images
        for depth, part in enumerate(parts):
            x = self._run(depth, part, x)
        if features:
            return self.features(self.norm(x))
        x = self._run(len(self.blocks) + 1, self._pool, x)
        if self.representation is not None:
            x = torch.tanh(self.representation(x))
        return x if self.head is None else self.head(x)

    def train(self, mode: bool = True) -> "VisionTransformer":
        """As of any module; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            for part in (self.dropout, *self.blocks[: self.frozen - 1]):
                part.eval()
        return self

    def _run(self, depth: int, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if depth >= self.frozen:
            return part(x)
        with torch.no_grad():
            x = part(x)
        # Of a block whose input needs no gradient, DeepSpeed (ZeRO 3) would take the gradients before they are there.
        return x.requires_grad_(torch.is_grad_enabled() and depth == self.frozen - 1)

    def _pool(self, x: Tensor) -> Tensor:
        # The norm works on each token by itself, so the class token's needs no other token's.
        return self.norm(x[:, 0]) if self.spec.pool == "cls" else self.norm(x).mean(dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """[b, c, h, w] → [b, n, d]: the class token where there is one, then the patches; with positions."""
        spec = self.spec
        if images.shape[1:] != (spec.channels, spec.image_size, spec.image_size) or not images.is_floating_point():
            raise InputError(
                f"images: found {images.dtype} {list(images.shape)}; this model takes floating-point "
                f"[b, {spec.channels}, {spec.image_size}, {spec.image_size}] (b, channels, rows, columns)"
            )
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(images.to(dtype))
        if spec.positions == "sincos2d":
            x = x + sincos2d(spec.grid, spec.width, device=x.device, dtype=dtype)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        if self.position_embedding is not None:
            x = x + self.position_embedding
        return self.dropout(x)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """[b, n, d] after the final norm → features by name, as `forward` documents them."""
        if self.spec.pool == "cls":
            found = {"cls": x[:, 0], "mean": x[:, 1:].mean(dim=1)}
        else:
            mean = x.mean(dim=1)
            found = {"cls": mean, "mean": mean}
        if self.representation is not None:
            found["pre_tanh"] = self.representation(found["cls"])
            found["tanh"] = torch.tanh(found["pre_tanh"])
        return found


def tensor_shapes(spec: ViTSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict of a VisionTransformer(spec)."""
    with torch.device("meta"):
        state = VisionTransformer(spec).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_tensors(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: str,
    *,
    where: str = "weights",
) -> None:
    """Raise InputError unless `tensors` has exactly the names and `shapes` of the model `wanted` describes.

    The message names what is missing, unexpected and mis-shaped, and what model the tensors seem to be of.
    """
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes]
    misshaped = [
        f"{name} {list(tensors[name].shape)}, wanted {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if not (missing or unexpected or misshaped):
        return
    faults = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
    raise InputError(
        f"{where}: of another model. Found: {describe_tensors(tensors)}. Wanted: {wanted}. "
        + ". ".join(f"{fault}: {_few(names)}" for fault, names in faults if names)
        + ". Give weights of this model, or set `model` in the config to theirs"
    )


def describe_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The sizes that can be read off the tensors of a VisionTransformer, in words."""
    blocks = [name.split(".")[1] for name in tensors if name.startswith("blocks.")]
    parts = []
    if (patches := tensors.get("patch_embedding.weight")) is not None and patches.ndim == 4:
        width, channels, patch, _ = patches.shape
        parts += [f"patch {patch}, {len(set(blocks))} layers, width {width}", f"{channels} channels"]
    if (fc1 := tensors.get("blocks.0.mlp.fc1.weight")) is not None:
        parts.insert(1, f"mlp {len(fc1)}")
    if (positions := tensors.get("position_embedding")) is not None and positions.ndim == 3:
        parts.append(f"{positions.shape[1]} positions")
    if (representation := tensors.get("representation.weight")) is not None:
        parts.append(f"representation {len(representation)}")
    if (head := tensors.get("head.weight")) is not None:
        parts.append(f"{len(head)} classes")
    return ", ".join(parts) or f"{len(tensors)} tensors, none of them a Vision Transformer's"


def load_tensors(
    model: VisionTransformer,
    tensors: Mapping[str, Tensor],
    *,
    where: str = "weights",
    gathered: Gathered = nullcontext,
) -> None:
    """Copy `tensors` (state-dict names, any float type) into the model's parameters, exactly.

    `where` says in messages where the tensors came from. `gathered` as for `initialize`.
    Raises InputError naming missing, unexpected and mis-shaped tensors and the two models.
    """
    check_tensors(tensors, tensor_shapes(model.spec), model.spec.describe(), where=where)
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" if prefix else name: p for name, p in module.named_parameters(recurse=False)}
        with torch.no_grad(), gathered(materialised(own.values())):
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


def materialised(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters, as a list. Raises RuntimeError on the meta device, where a copy is lost in silence."""
    found = list(parameters)
    if any(parameter.is_meta for parameter in found):
        raise RuntimeError("the model is on the meta device: call model.to_empty(device=…) before filling it")
    return found


def _few(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + rest
