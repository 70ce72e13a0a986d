"""The kinds of values that a checkpoint holds, and a fingerprint of them that does not depend on how they were cut."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT = "weight"
AVERAGE = "average"  # the Polyak average of the weights, a state of the optimizer beside the moments
_CHUNK = 1 << 20  # values fingerprinted at a time
_MIX = (-7046029254386353131, -4658895280553007687)  # odd constants of splitmix64, as signed 64-bit integers


def fingerprint(values: Tensor, place: int) -> int:
    """An integer of fp32 `values` [n], that stand at `place`, `place` + 1, … of the row of all parameters.

    The sum modulo 2⁶⁴ over the values of a hash of (bits, place): of two parts it is the sum of theirs, so it does not
    depend on how the values were cut.
    """
    total = 0
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        bits = part.contiguous().view(torch.int32).to(torch.int64)
        places = torch.arange(place + start, place + start + len(part), device=bits.device)
        mixed = (bits + places * _MIX[0]).mul_(_MIX[1])
        mixed ^= mixed >> 31
        total += int(mixed.mul_(_MIX[0]).sum().item())
    return total % 2**64
