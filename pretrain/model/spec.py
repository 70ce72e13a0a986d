"""What a Vision Transformer is built from: its sizes, checked when they are put together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pretrain.errors import InputError, nearest

Gelu = Literal["exact", "tanh"]
Pool = Literal["cls", "mean"]
Positions = Literal["learned", "sincos2d"]

# Paper, Table 1 (B, L, H); "How to train your ViT?", Table 2 (Ti, S).
ARCHITECTURES: dict[str, dict[str, int]] = {
    "vit_ti_16": {"patch_size": 16, "layers": 12, "width": 192, "mlp": 768, "heads": 3},
    "vit_s_16": {"patch_size": 16, "layers": 12, "width": 384, "mlp": 1536, "heads": 6},
    "vit_b_16": {"patch_size": 16, "layers": 12, "width": 768, "mlp": 3072, "heads": 12},
    "vit_b_32": {"patch_size": 32, "layers": 12, "width": 768, "mlp": 3072, "heads": 12},
    "vit_l_16": {"patch_size": 16, "layers": 24, "width": 1024, "mlp": 4096, "heads": 16},
    "vit_l_32": {"patch_size": 32, "layers": 24, "width": 1024, "mlp": 4096, "heads": 16},
    "vit_h_14": {"patch_size": 14, "layers": 32, "width": 1280, "mlp": 5120, "heads": 16},
}


@dataclass(frozen=True)
class ViTSpec:
    """Sizes and options of one Vision Transformer.

    `image_size` is the side of the square input in pixels. It need not be a multiple of `patch_size`: the
    patch convolution is VALID, so the last `image_size % patch_size` rows and columns are ignored.
    `representation_size` puts Linear → tanh before the classification layer (pre-training); None leaves it
    out. `drop_path` is stochastic depth (arXiv:1603.09382) at the last block. `gelu="tanh"` is the
    approximation of the Flax original, needed to reproduce the official weights.
    `pool="mean"` averages the patch tokens and has no class token; with `positions="sincos2d"` (fixed) it is
    the model of "Better plain ViT baselines for ImageNet-1k". `norm_eps` and `qkv_bias` differ from the
    paper's only in networks that come from elsewhere. `num_classes=0` is a network without a
    classification layer: it gives features.

    Raises InputError naming the field.
    """

    patch_size: int
    layers: int
    width: int
    mlp: int
    heads: int
    image_size: int = 224
    channels: int = 3
    num_classes: int = 1000
    representation_size: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    gelu: Gelu = "exact"
    pool: Pool = "cls"
    positions: Positions = "learned"
    norm_eps: float = 1e-6  # of every LayerNorm
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        for name in (
            "patch_size",
            "layers",
            "width",
            "mlp",
            "heads",
            "image_size",
            "channels",
        ):
            _positive(name, getattr(self, name))
        if self.num_classes != 0:
            _positive("num_classes", self.num_classes, "a whole number from 1, or 0 for no classification layer")
        if self.representation_size is not None:
            _positive("representation_size", self.representation_size, "a whole number from 1, or null")
        if self.width % self.heads:
            raise InputError(
                f"model.width: {self.width} does not divide among model.heads {self.heads}; "
                f"a multiple of {self.heads} would, such as {self.heads * math.ceil(self.width / self.heads)}"
            )
        if self.image_size < self.patch_size:
            raise InputError(
                f"model.image_size: {self.image_size} px holds no patch of model.patch_size "
                f"{self.patch_size} px; it must be at least {self.patch_size}"
            )
        for name in ("dropout", "drop_path"):
            share = getattr(self, name)
            if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share < 1:
                raise InputError(f"model.{name}: found {share!r}; it must be a number in [0, 1)")
        if self.drop_path and self.layers == 1:
            raise InputError(
                f"model.drop_path: found {self.drop_path}, but it rises from 0 at the first block, and model.layers is "
                "1; leave it out"
            )
        if not isinstance(self.norm_eps, float) or not 0 < self.norm_eps < 1:
            raise InputError(f"model.norm_eps: found {self.norm_eps!r}; it must be a number in (0, 1)")
        if not isinstance(self.qkv_bias, bool):
            raise InputError(f"model.qkv_bias: found {self.qkv_bias!r}; it must be true or false")
        for name, kind in (("gelu", Gelu), ("pool", Pool), ("positions", Positions)):
            if getattr(self, name) not in get_args(kind):
                choices = " or ".join(f'"{choice}"' for choice in get_args(kind))
                raise InputError(f"model.{name}: found {getattr(self, name)!r}; it must be {choices}")
        if self.positions == "sincos2d" and (self.width % 4 or self.width < 8):
            raise InputError(
                f'model.width: {self.width} cannot hold model.positions "sincos2d", which needs four equal '
                "parts (sine and cosine of x and of y); a multiple of 4 from 8 would do"
            )

    @classmethod
    def recorded(cls, fields: Mapping[str, Any]) -> "ViTSpec":
        """The network that a checkpoint or an export records. What an earlier version did not record is as then.

        Raises InputError for a field that this version does not know: it may change what is computed. What names no
        fields at all raises ValueError or TypeError.
        """
        unknown = sorted(dict(fields).keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise InputError(
                f"model.{', model.'.join(unknown)}: recorded by a later version of this program, which this one does "
                "not know; take that version"
            )
        return cls(**fields)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of the sequence: the patches and, unless they are averaged, the class token."""
        return self.grid**2 + (self.pool == "cls")

    @property
    def drop_paths(self) -> list[float]:
        """Each block's share of dropped branches, rising linearly from 0 at the first to `drop_path` at the last."""
        return [self.drop_path * number / max(self.layers - 1, 1) for number in range(self.layers)]

    def describe(self) -> str:
        """One line for messages: the sizes that decide the shapes of the parameters."""
        head = f"representation {self.representation_size}, " if self.representation_size else ""
        return (
            f"patch {self.patch_size}, {self.layers} layers, width {self.width}, mlp {self.mlp}, "
            f"{self.image_size} px (grid {self.grid}x{self.grid}), {self.channels} channels, "
            f"{head}{self.num_classes or 'no'} classes"
        )

    def near(self) -> str:
        """The named architecture that this one is, or is but for one or two sizes, which are named; else empty."""
        differing = {
            name: {key: size for key, size in sizes.items() if size != getattr(self, key)}
            for name, sizes in ARCHITECTURES.items()
        }
        name, others = min(differing.items(), key=lambda found: len(found[1]))
        if len(others) > 2:
            return ""
        but = ", ".join(f"{key} {getattr(self, key)} (not {size})" for key, size in others.items())
        return f"{name} with {but}" if but else name


def spec_from_arch(name: str, **overrides: Any) -> ViTSpec:
    """The ViTSpec of ARCHITECTURES[name], fields replaced. Raises InputError for an unknown name or field."""
    if name not in ARCHITECTURES:
        raise InputError(f"model.arch: found {name!r}; {_nearest(name, list(ARCHITECTURES))}")
    known = [field.name for field in fields(ViTSpec)]
    for key in overrides:
        if key not in known:
            raise InputError(f"model.{key}: no such field of a model; {_nearest(key, known)}")
    return ViTSpec(**{**ARCHITECTURES[name], **overrides})


def _positive(name: str, value: object, right: str = "a whole number from 1") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"model.{name}: found {value!r}; it must be {right}")


def _nearest(name: str, known: list[str]) -> str:
    close = nearest(name, known)
    choices = f"it must be one of {', '.join(known)}"
    return f"did you mean {close!r}? {choices}" if close else choices
