"""Weights from wherever they are: a run folder or a checkpoint inside one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.engine import checkpoint
from pretrain.engine.quiet import quiet
from pretrain.errors import InputError
from pretrain.model.spec import ViTSpec
from pretrain.model.vit import check_tensors, tensor_shapes


@dataclass(frozen=True)
class Weights:
    """A network's parameters, whole, in fp32 on the CPU."""

    spec: ViTSpec
    tensors: dict[str, Tensor]
    step: int | None
    source: Path  # the checkpoint they were read from
    sha256: str  # of names, shapes and values: the same however many ranks wrote them


def load_weights(path: str | Path) -> Weights:
    """Read WEIGHTS: a run folder (its newest whole checkpoint) or a checkpoint folder.

    Raises:
        InputError: nothing there, no whole checkpoint, or tensors that are not the network's.
    """
    saved = find_checkpoint(Path(path))
    spec = ViTSpec(**saved.state["model"])
    tensors = _read_tensors(saved)
    check_tensors(tensors, tensor_shapes(spec), spec.describe(), where=f"checkpoint {saved.path}")
    return Weights(spec, tensors, saved.step, saved.path, fingerprint(tensors))


def read_spec(path: str | Path) -> ViTSpec:
    """The network of WEIGHTS, without its tensors. Raises as `load_weights`."""
    return ViTSpec(**find_checkpoint(Path(path)).state["model"])


def find_checkpoint(path: Path) -> checkpoint.Saved:
    """The checkpoint that WEIGHTS names.

    Raises:
        InputError: there is none, with what was looked for.
    """
    if not path.exists():
        raise InputError(f"weights {path}: no such file or folder; give a run folder or a checkpoint inside one")
    if (path / checkpoint.STATE).is_file():
        return checkpoint.read(path)
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    saved, passed_over = checkpoint.newest(folder)
    if saved is None:
        damaged = "".join(f"; {fault}" for fault in passed_over.values())
        raise InputError(
            f"weights {path}: no whole checkpoint under {folder}{damaged}; give a run folder that has trained, "
            "or a checkpoint inside one"
        )
    return saved


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 over every tensor's name, shape and fp32 little-endian values, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].float().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def _read_tensors(saved: checkpoint.Saved) -> dict[str, Tensor]:
    """The fp32 parameters: of stage 0 as they were saved, else put together from the ranks' partitions."""
    if saved.state["zero_stage"] == 0:
        # weights_only=False: DeepSpeed's files hold its own classes; they come from this project's runs.
        module = torch.load(saved.path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
        return {name: tensor.float() for name, tensor in module.items()}
    parts = [
        torch.load(file, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
        for rank in range(saved.state["ranks"])
        if (file := saved.path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").is_file()
    ]
    if parts and "zero_stage" not in parts[0]:
        return _join_partitions(saved.path, [part["single_partition_of_fp32_groups"] for part in parts])
    with quiet():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        tensors = get_fp32_state_dict_from_zero_checkpoint(str(saved.path.parent), tag=saved.path.name)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _join_partitions(path: Path, parts: list[list[Tensor]]) -> dict[str, Tensor]:
    """The fp32 parameters of ZeRO-1 with bf16 and fp32 accumulation, whose files DeepSpeed's converter cannot read.

    parts: by rank, then by parameter group. A group is one flat vector in the order of `param_shapes`, cut into equal
    parts by rank.
    """
    shapes = torch.load(path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["param_shapes"]
    tensors = {}
    for group, named in enumerate(shapes):
        flat, start = torch.cat([part[group].detach().float() for part in parts]), 0
        for name, shape in named.items():
            tensors[name] = flat[start : start + shape.numel()].view(shape).clone()
            start += shape.numel()
    return tensors
