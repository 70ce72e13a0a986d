"""Google's `.npz` as the paper's authors released it: modules numbered together, a position for the class token."""

from __future__ import annotations

from functools import partial

from pretrain.weights.formats import google
from pretrain.weights.formats.format import Format
from pretrain.weights.formats.google import VIT_JAX

NPZ = Format(
    name="npz",
    library="timm",
    suffix=".npz",
    pixels_as_here=True,
    prepared=partial(google.prepared, VIT_JAX),
    spec=partial(google.spec, VIT_JAX),
    rows=partial(google.rows, VIT_JAX),
    lacks=google.lacks,
    example=google.example(VIT_JAX),
    arguments=partial(google.arguments, VIT_JAX),
)
