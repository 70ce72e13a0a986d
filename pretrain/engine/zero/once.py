"""Weights and gradients of an fp32 run under ZeRO 1 and 2, held once.

The network of such a run computes with fp32 weights already, but DeepSpeed 0.19.8 keeps the optimizer's part of them a
second time, and a gradient up to three times: as autograd has it, averaged, and joined for the optimizer. Of the 26.7
bytes a parameter that a step took at its peak on one rank, 16 are needed: weight, gradient and two moments.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pretrain.engine.quiet import DeepSpeedZeroOptimizer, GradPartitionBufferGroup

# What DeepSpeed's optimizer must have, or all stays as it makes it.
_RELIED_ON = (
    "_clear_param_grad_only", "_epilogue_ran_this_backward", "_release_ipg_buffers", "averaged_gradients",
    "_use_compact_grad_partition_buffer", "backward_prologue", "bit16_groups", "bit16_groups_flat",
    "gradient_reduction_w_predivide", "params_in_partition", "parallel_partitioned_bit16_groups", "partition_size",
    "reduce_bucket_size", "reduce_gradients", "round_robin_bit16_offsets", "single_partition_of_fp32_groups",
)  # fmt: skip


def hold_once(engine: Any) -> bool:
    """Let a new engine of an fp32 run under ZeRO 1 or 2 hold weights and gradients once; whether it does.

    No number changes: what is added up, and in which order, stays as it was. Half precision needs two copies of the
    weights; with the optimizer on the host, one is there and one on the device; options that decide how gradients are
    exchanged keep DeepSpeed's own way.
    """
    zero = engine.optimizer
    if not _shareable(zero):
        return False
    _share_weights(zero)
    if zero.partition_gradients:
        # Gradients are averaged into one flat tensor, as DeepSpeed does where it adds up half-precision gradients in
        # fp32, rather than copied, then joined.
        zero._use_compact_grad_partition_buffer = lambda group: True
    else:
        _FlatGradients(zero)
    return True


def _shareable(zero: Any) -> bool:
    return (
        isinstance(zero, DeepSpeedZeroOptimizer)
        and all(hasattr(zero, name) for name in _RELIED_ON)
        and zero.dtype == zero.gradient_accumulation_dtype == zero.communication_data_type == torch.float32
        and zero.contiguous_gradients
        and not (zero.cpu_offload or zero.overlap_comm or zero.reduce_scatter or zero.round_robin_gradients)
    )


def _share_weights(zero: Any) -> None:
    """Let the optimizer update the network's own weights."""
    for partition, parts in zip(
        zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True
    ):
        partition.data = parts[_rank(zero)]
    for index, group in enumerate(zero.bit16_groups):
        for parameter in group:
            if (part := parameter._hp_mapping) is not None:  # a view of the copy, which would keep it in memory
                place = part.hp_fragment_address
                flat = zero.single_partition_of_fp32_groups[index].detach()
                part.hp_fragment = flat.narrow(0, place.start, place.numel)


def _rank(zero: Any) -> int:
    return torch.distributed.get_rank(zero.dp_process_group)


class _FlatGradients:
    """The gradients of a rank under ZeRO 1: a flat tensor for each parameter group, laid out like its weights.

    Autograd adds to views of it, the ranks' average is written over it, and the optimizer takes its part of it: nothing
    is copied.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._flats = [torch.zeros_like(flat) for flat in zero.bit16_groups_flat]
        trained = [group.get("lr_scale", 1.0) != 0 for group in zero.optimizer.param_groups]  # others have no gradient
        self._places = [
            (parameter, flat.narrow(0, offset, parameter.numel()).view_as(parameter))
            for group, offsets, flat, wanted in zip(
                zero.bit16_groups, zero.round_robin_bit16_offsets, self._flats, trained, strict=True
            )
            for parameter, offset in zip(group, offsets, strict=True)
            if wanted
        ]
        self._buckets = _buckets([place.view(-1) for _, place in self._places], zero.reduce_bucket_size)
        self._parts = [self._part(index) for index in range(len(self._flats))]
        self._begun = False
        zero.backward_prologue, zero.reduce_gradients = self.begin, self.average

    def _part(self, index: int) -> GradPartitionBufferGroup:
        """A group's gradients that this rank's optimizer takes: of each parameter, and all as one flat tensor."""
        zero, size = self._zero, int(self._zero.partition_size[index])
        flat = self._flats[index].narrow(0, _rank(zero) * size, size)
        pieces = []
        for parameter in zero.params_in_partition[index]:
            place, shape = parameter._hp_mapping.hp_fragment_address, parameter.shape
            piece = flat.narrow(0, place.start, place.numel)
            pieces.append(piece.view(shape) if place.numel == parameter.numel() else piece)
        return GradPartitionBufferGroup(pieces, flat)

    @torch.no_grad()
    def begin(self) -> None:
        """Before a backward pass: in the first of a step, the gradients are zero."""
        if self._begun:
            return
        self._begun = True
        for flat in self._flats:
            flat.zero_()
        for parameter, place in self._places:
            parameter.grad = place

    @torch.no_grad()
    def average(self, pipeline_parallel: bool = False) -> None:
        """After the last backward pass of a step: the gradients become the ranks' average. Collective."""
        zero, self._begun = self._zero, False
        assert all(parameter.grad is place for parameter, place in self._places), "a gradient lies elsewhere"
        for bucket in self._buckets if torch.distributed.get_world_size(zero.dp_process_group) > 1 else ():
            joined = bucket[0] if len(bucket) == 1 else torch.cat(bucket)
            zero.gradient_reduction_w_predivide(joined, joined.dtype)
            for piece, averaged in zip(bucket, joined.split([len(piece) for piece in bucket]), strict=True):
                piece.copy_(averaged)  # of a single piece, onto itself: nothing is done
        zero.averaged_gradients.update(enumerate(self._parts))
        zero._release_ipg_buffers()
        zero._clear_param_grad_only()
        zero._epilogue_ran_this_backward = True


def _buckets(places: list[Tensor], most: int) -> list[list[Tensor]]:
    """Places in buckets of at most so many values (or one place), divided as DeepSpeed does: [n] each, in order.

    The division decides the order in which three ranks or more add up. Neighbours in memory are joined to one.
    """
    numbers, number, filled = [], 0, 0
    for place in places:
        if filled and filled + len(place) > most:
            number, filled = number + 1, 0
        filled += len(place)
        numbers.append(number)
    buckets: list[list[Tensor]] = []
    for _, bucket in groupby(zip(numbers, places, strict=True), key=lambda entry: entry[0]):
        joined: list[Tensor] = []
        for _, place in bucket:
            last = joined[-1] if joined else None
            if last is not None and _follows(place, last):
                joined[-1] = last.as_strided((len(last) + len(place),), (1,))
            else:
                joined.append(place)
        buckets.append(joined)
    return buckets


def _follows(place: Tensor, other: Tensor) -> bool:
    same = place.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same and bool(place.storage_offset() == other.storage_offset() + len(other))
