"""The config section `model`."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator, model_validator

from pretrain.errors import InputError, nearest
from pretrain.model.spec import ARCHITECTURES, Gelu, Pool, Positions, ViTSpec
from pretrain.section import Section, key

_SIZES = tuple(next(iter(ARCHITECTURES.values())))


class ModelSection(Section):
    """The network. `arch` names a size of the paper; sizes given beside it replace its own, and all five replace it.

    Once read, it holds either `arch` alone or the five sizes.
    """

    arch: str | None = key(None, about=f"A size by its name: {' '.join(ARCHITECTURES)}.")
    patch_size: int | None = key(None, about="Side of a patch, in pixels.")
    layers: int | None = key(None, about="Transformer blocks.")
    width: int | None = key(None, about="Length of a token's vector.")
    mlp: int | None = key(None, about="Hidden units of a block's MLP.")
    heads: int | None = key(None, about="Attention heads of a block; they divide the width.")
    image_size: int = key(224, about="Side of the square input, in pixels.")
    channels: int = key(3, about="Colour channels: 3, or 1 for grey images.")
    num_classes: int = key(1000, about="Outputs of the classification layer.", gt=0)
    representation_size: int | None = key(
        None, about="Width of the linear layer and tanh before the classification layer; null: there is none."
    )
    dropout: float = key(0.0, about="Share of activations dropped while training.")
    drop_path: float = key(
        0.0,
        about="Stochastic depth: share of a sample's residual branches dropped at the last block, rising linearly from "
        "0 at the first.",
    )
    gelu: Gelu = key("exact", about='The activation; "tanh" approximates it as the official weights need.')
    pool: Pool = key("cls", about="What is classified: the class token, or the mean of the patch tokens.")
    positions: Positions = key("learned", about="Position embedding: learned, or fixed sines and cosines.")
    norm_eps: float = key(1e-6, about="ε of the layer norms; weights from elsewhere may want another one.", gt=0, lt=1)
    qkv_bias: bool = key(True, about="Whether query, key and value have a bias; weights from elsewhere may have none.")
    head_bias: float = key(
        0.0,
        about="Initial bias of the classification layer; −ln(classes) starts a sigmoid loss from the base rate.",
    )

    @field_validator("arch")
    @classmethod
    def _known(cls, arch: str | None) -> str | None:
        if arch is not None and arch not in ARCHITECTURES:
            near = nearest(arch, ARCHITECTURES)
            hint = f"did you mean {near}? " if near else ""
            raise ValueError(f"unknown architecture {arch!r}; {hint}known: {' '.join(ARCHITECTURES)}")
        return arch

    @model_validator(mode="before")
    @classmethod
    def _arch_or_sizes(cls, said: Any) -> Any:
        name = said.get("arch") if isinstance(said, dict) else None
        sizes = ARCHITECTURES.get(name) if isinstance(name, str) else None
        if sizes is None:
            return said
        given = {key: said[key] for key in sizes if said.get(key) is not None}
        if {**sizes, **given} == sizes:
            return {**said, **dict.fromkeys(sizes)}
        if len(given) == len(sizes):
            raise ValueError(
                f"arch {name!r} has no effect where {', '.join(sizes)} are all set; leave it out, or set to null the "
                "sizes that it should give"
            )
        return {**said, **sizes, **given, "arch": None}

    @model_validator(mode="after")
    def _sized(self) -> ModelSection:
        missing = [key for key in _SIZES if getattr(self, key) is None]
        if self.arch is None and missing:
            raise ValueError(
                f"without arch, {', '.join(missing)} must be given (or name one of {' '.join(ARCHITECTURES)})"
            )
        try:
            self.spec()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def spec(self) -> ViTSpec:
        """The network's specification."""
        keys = set(ViTSpec.__dataclass_fields__)
        said = {key: value for key, value in self.model_dump().items() if key in keys and value is not None}
        return ViTSpec(**{**ARCHITECTURES.get(self.arch or "", {}), **said})
