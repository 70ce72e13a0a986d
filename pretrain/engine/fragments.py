"""Which part of the training state a rank holds, and where DeepSpeed keeps it.

Every ZeRO stage cuts the fp32 weights and the optimizer's states its own way. A fragment describes them all alike:
consecutive values of a named, flattened parameter, in a flat tensor of the optimizer. Checkpoints, the averaged weights
and fingerprints use fragments only, so none of them depends on stage, ranks or precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.pieces import AVERAGE, WEIGHT
from pretrain.engine.quiet import deepspeed
from pretrain.errors import InputError
from pretrain.ranks.collectives import together

_EXCHANGED = 1 << 20  # values swapped with the average at a time


@dataclass(frozen=True)
class Fragment:
    """The values [begin, begin + numel) of a flattened parameter, in the optimizer's tensor `flat` from `offset`."""

    name: str
    begin: int
    numel: int
    flat: Tensor
    offset: int

    def view(self, optimizer: Any, kind: str) -> Tensor:
        """These values [numel] of the fp32 weights or of a state of the optimizer: the memory itself, no copy.

        All are fp32, but for a momentum that is stored in bfloat16. Checkpoints hold fp32, so the same values.
        """
        whole = self.flat.detach() if kind == WEIGHT else optimizer.state[self.flat][kind]
        return whole.view(-1).narrow(0, self.offset, self.numel)


def kinds(engine: Any) -> tuple[str, ...]:
    """The kinds of values: the weights and the optimizer's states, by name."""
    return (WEIGHT, *engine.basic_optimizer.kinds)


def held(engine: Any) -> list[Fragment]:
    """All fragments of this rank, in the order of the network's parameters. Without ZeRO that is everything."""
    zero = engine.optimizer
    found = []
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 3:  # ZeRO 3: equal parts of each parameter, the last one padded
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            begin = engine.global_rank * size
            numel = min(size, parameter.ds_numel - begin)
            if numel > 0:
                found.append(Fragment(name, begin, numel, zero.fp32_partitioned_groups_flat[group], offset))
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2: equal parts of all parameters in a row
            part = parameter._hp_mapping
            if part is not None:
                here, there = part.lp_fragment_address, part.hp_fragment_address
                flat = _flat_partitions(zero)[part.param_group_index]
                found.append(Fragment(name, here.start, here.numel, flat, there.start))
        else:
            found.append(Fragment(name, 0, parameter.numel(), parameter, 0))
    return found


def values_held(engine: Any) -> int:
    """The number of values of all kinds that this rank holds."""
    return len(kinds(engine)) * sum(fragment.numel for fragment in held(engine))


def state_bytes(engine: Any) -> dict[str, int]:
    """Bytes of "parameters" that the network computes with, "optimizer" (fp32 weights, where they are not the
    parameters themselves, and moments) and "average" that this rank holds in its device's memory from step to step.
    """
    optimizer = engine.basic_optimizer
    parameters = list(engine.module.parameters())
    computed = engine.optimizer.fp16_partitioned_groups_flat if engine.zero_optimization_stage() == 3 else parameters
    states = [(kind, state) for of_one in optimizer.state.values() for kind, state in of_one.items()]
    tensors = [(kind, state) for kind, state in states if torch.is_tensor(state)]
    of = {
        "parameters": computed,
        "optimizer": [*optimizer.state, *(state for kind, state in tensors if kind != AVERAGE)],
        "average": [state for kind, state in tensors if kind == AVERAGE],
    }
    sizes, counted = {}, set[int]()
    for part, held_here in of.items():
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in held_here
            if tensor.device.type == engine.device.type
        }
        sizes[part] = sum(size for address, size in storages.items() if address not in counted)
        counted |= storages.keys()
    return sizes


def share(engine: Any) -> list[Fragment]:
    """The fragments that this rank saves: each value is saved by exactly one rank."""
    fragments = held(engine)
    if engine.zero_optimization_stage() > 0 or engine.world_size == 1:
        return fragments
    total = sum(fragment.numel for fragment in fragments)
    low, high = (total * rank // engine.world_size for rank in (engine.global_rank, engine.global_rank + 1))
    mine, start = [], 0
    for fragment in fragments:
        first, last = max(low - start, 0), min(high - start, fragment.numel)
        if first < last:
            mine.append(replace(fragment, begin=first, offset=first, numel=last - first))
        start += fragment.numel
    return mine


def allocate_states(engine: Any) -> None:
    """Allocate the optimizer's states, with their values before the first update."""
    for flat in _flats(engine):
        engine.basic_optimizer.allocate(flat)


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Make the network compute with the fp32 weights as they are now. Collective."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        # DeepSpeed gathers only what is partitioned. Parameters that are gathered already would keep their old values:
        # small ones between steps, any after a forward pass without a backward one. So partition all of them again.
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
    elif stage > 0:
        zero.update_lp_params()


def check_names(engine: Any) -> None:
    """Refuse an engine whose fragments hold other values than the network computes with. Collective.

    Fragments rely on DeepSpeed's own records of where it keeps a parameter. If these were wrong, values would be saved
    under other parameters' names, and no fingerprint would show it. Under ZeRO 3 one parameter at a time is gathered.

    Raises:
        InputError: naming the parameters.
    """
    pieces = {fragment.name: fragment for fragment in held(engine)}
    wrong = []
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):  # does nothing where they are not partitioned
            if name in pieces and not _computes_with(engine, pieces[name], parameter):
                wrong.append(name)

    def check() -> None:
        if wrong:
            listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise InputError(
                f"deepspeed: under ZeRO {engine.zero_optimization_stage()}, DeepSpeed {deepspeed.__version__} holds "
                f"other values as {listed} than the network computes with; checkpoints would mix up the weights. Leave "
                "options of zero_optimization out, or install deepspeed==0.19.8"
            )

    together(check)


@contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """Inside, the network computes with the averaged weights. Collective."""
    _exchange(engine)
    try:
        yield
    finally:
        _exchange(engine)


def parameter_begins(engine: Any) -> dict[str, int]:
    """Where each parameter begins when all are laid out one after the other."""
    begins, end = {}, 0
    for name, parameter in engine.module.named_parameters():
        begins[name] = end
        end += getattr(parameter, "ds_numel", parameter.numel())
    return begins


def _flat_partitions(zero: Any) -> list[Tensor]:
    """This rank's part of each parameter group: under ZeRO 1 and 2, or DeepSpeed's separate optimizer for bf16."""
    flat = getattr(zero, "single_partition_of_fp32_groups", None)
    return zero.fp32_groups_flat_partition if flat is None else flat


def _flats(engine: Any) -> list[Tensor]:
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        return list(zero.fp32_partitioned_groups_flat)
    return _flat_partitions(zero) if stage > 0 else list(engine.module.parameters())


def _computes_with(engine: Any, fragment: Fragment, parameter: Tensor) -> bool:
    """Whether `parameter`, gathered, has the fragment's values in its own precision."""
    here = parameter.detach().view(-1).narrow(0, fragment.begin, fragment.numel)
    kept = fragment.view(engine.basic_optimizer, WEIGHT).to(here.device, here.dtype)
    # NaN: not filled yet, a checkpoint will be.
    return torch.equal(kept, here) or torch.allclose(kept, here, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def _exchange(engine: Any) -> None:
    optimizer = engine.basic_optimizer
    for flat in _flats(engine):
        parts = (tensor.view(-1).split(_EXCHANGED) for tensor in (flat.detach(), optimizer.state[flat][AVERAGE]))
        for weights, average in zip(*parts, strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
    refresh(engine)
