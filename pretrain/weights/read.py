"""Weights from a file or folder of any known format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.weights.formats.big_vision import BIG_VISION
from pretrain.weights.formats.format import Format, description
from pretrain.weights.formats.hf import HF
from pretrain.weights.formats.native import NATIVE
from pretrain.weights.formats.npz import NPZ
from pretrain.weights.formats.table import from_file
from pretrain.weights.formats.timm import TIMM
from pretrain.weights.formats.torchvision import TORCHVISION
from pretrain.weights.pixels import OURS, Normalisation, fold, told_by
from pretrain.weights.tensorfile import TensorFile, open_tensors
from pretrain.weights.weights import fingerprint

FORMATS: dict[str, Format] = {one.name: one for one in (NATIVE, NPZ, BIG_VISION, TORCHVISION, TIMM, HF)}

# What tells a Vision Transformer of another kind: a part of a tensor's name → what it is.
OTHER_KINDS = {
    r"\bls[12]?\.|layer_?scale|\bgamma_[12]\b|lambda_[12]\b|LayerScale": "LayerScale (DINOv2, DeiT III, CaiT)",
    r"register_?tokens?|reg_token|storage_tokens": "register tokens (DINOv2, DINOv3)",
    r"\brope|rotary|freqs": "rotary positions (DINOv3, EVA)",
    r"mask_token": "a mask token (DINOv2, BEiT, SimMIM)",
    r"dist_token|distillation_token|head_dist": "a distillation token (DeiT)",
    r"detection_tokens": "detection tokens (YOLOS)",
    r"relative_position|rel_pos": "relative positions (BEiT, Swin, SAM)",
    r"norm_pre\b|ln_pre|pre_layrnorm|class_embedding": "a norm before the blocks (CLIP)",
    r"[qk]_norm|query_norm|key_norm": "norms of queries and keys",
    r"attn\.norm|mlp\.norm|sub_norm|inner_attn_ln|ffn_layernorm": "norms inside attention or MLP (BEiT-3, EVA-02)",
    r"attn\.[qv]_bias": "a bias of queries and values alone (BEiT, EVA)",
    r"mlp\.w12|w12\.|gate_proj|mlp\.fc1_g": "a gated MLP (SwiGLU)",
    r"\battns\.\d": "parallel branches",
    r"attn_pool|MAPHead|head\.probe": "attention pooling (SigLIP)",
    r"conv_root|gn_root|patch_embed\.backbone|conv_bn_relu": "convolutions before it (R50+ViT)",
    r"fc_norm": "pooling before the final norm (MAE, timm's global_pool='avg')",
}


@dataclass(frozen=True)
class FoundFile:
    """A file of weights whose network is known; its values are not read yet."""

    file: TensorFile
    format: Format
    spec: ViTSpec
    description: dict[str, Any]  # of an export of this project: step, source, sha256 of its tensors
    normalisation: Normalisation | None = None  # of the images it was trained on; None where that is not told

    def read(self) -> dict[str, Tensor]:
        """The network's tensors in fp32, by our names, for images that are normalised as here.

        Raises:
            InputError: tensors are missing, left over, of another shape, or not those that were exported.
        """
        tensors = from_file(self.file, self.format.rows(self.spec), self.spec)
        written = self.description.get("sha256")
        if written and fingerprint(tensors) != written:
            raise InputError(
                f"weights {self.file.where}: damaged or changed: the values are not those that were exported; export "
                "them again"
            )
        if self.normalisation is None or self.normalisation.ours:
            return tensors
        return fold(tensors, self.normalisation, where=self.file.where)

    def pixel_notes(self) -> list[str]:
        """What is to be said of how its images were normalised: nothing where that is as here."""
        if self.normalisation is None:
            return [
                "does not say how images were normalised; taken to be trained on x / 127.5 - 1, as here (if not, "
                "export it with --mean and --std)"
            ]
        if self.normalisation.ours:
            return []
        return [f"trained on images of {self.normalisation}; its patch embedding is changed to take x / 127.5 - 1"]


def find_in_file(path: Path) -> FoundFile:
    """Tell the format and the network of a file or folder.

    Raises:
        InputError: it cannot be read, is of no known format, or of a Vision Transformer of another kind.
    """
    file = open_tensors(path)
    said = description(file)
    if said:
        if said["format"] not in FORMATS:
            raise InputError(f"weights {path}: of format {said['format']!r}; this version reads {', '.join(FORMATS)}")
        form = FORMATS[said["format"]]
        prepared = form.prepared(file)
        if prepared is None:
            raise InputError(f"weights {path}: says that it is of format {form.name}, but has not its tensors")
        return FoundFile(prepared, form, _plausible(ViTSpec.recorded(said["model"]), prepared), said, OURS)
    refuse_other_kinds(file)
    for form in FORMATS.values():
        prepared = form.prepared(file)
        if prepared is not None:
            pixels = OURS if form.pixels_as_here else told_by(file)
            return FoundFile(prepared, form, _plausible(form.spec(prepared), prepared), {}, pixels)
    names = ", ".join(list(file.shapes)[:4])
    raise InputError(
        f"weights {path}: of no known format ({', '.join(FORMATS)}); its {len(file.shapes)} tensors are {names}, …"
    )


def _plausible(spec: ViTSpec, file: TensorFile) -> ViTSpec:
    """The network that a file says it holds. Raises InputError for more blocks than tensors: building it would hang."""
    if spec.layers > len(file.shapes):
        raise InputError(
            f"weights {file.where}: says that it is of {spec.layers} blocks, but holds {len(file.shapes)} tensors"
        )
    return spec


def refuse_other_kinds(file: TensorFile) -> None:
    """Raises InputError for a Vision Transformer of another kind, naming what tells it apart."""
    found: dict[str, str] = {}
    for pattern, kind in OTHER_KINDS.items():
        for name in file.shapes:
            if re.search(pattern, name):
                found.setdefault(kind, name)
    if found:
        told = "; ".join(f"{kind}: {name}" for kind, name in found.items())
        raise InputError(f"weights {file.where}: of a Vision Transformer of another kind, with {told}")
