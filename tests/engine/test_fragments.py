"""The fingerprint of values does not depend on how they are cut, and sees any value that is elsewhere or other."""

import itertools
from types import SimpleNamespace

import torch
from torch import nn

from pretrain.checkpoint.pieces import WEIGHT, fingerprint
from pretrain.engine import restore


def test_the_parts_add_up_to_the_whole():
    values = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    whole = fingerprint(values, 17)
    for cuts in ([1], [5, 1_048_576], [999_999, 2_000_001]):
        edges = [0, *cuts, len(values)]
        parts = [fingerprint(values[a:b], 17 + a) for a, b in itertools.pairwise(edges)]
        assert sum(parts) % 2**64 == whole


def test_a_swap_a_flipped_bit_and_a_shift_are_seen():
    values = torch.arange(1000, dtype=torch.float32)
    whole = fingerprint(values, 0)
    swapped = values.clone()
    swapped[[3, 4]] = values[[4, 3]]
    flipped = values.clone()
    flipped.view(torch.int32)[77] ^= 1
    negative_zero = values.clone()
    negative_zero[0] = -0.0
    for other in (swapped, flipped, negative_zero):
        assert fingerprint(other, 0) != whole
    assert fingerprint(values, 1) != whole


def test_without_zero_a_copy_that_differs_on_one_rank_is_seen(monkeypatch):
    engine = SimpleNamespace(
        module=nn.Linear(3, 2), basic_optimizer=None, zero_optimization_stage=lambda: 0, optimizer=None
    )
    alike = restore.fingerprint_of(engine, WEIGHT)
    monkeypatch.setattr(restore, "all_gather_list", lambda mine: mine * 4)
    assert restore.fingerprint_of(engine, WEIGHT) == alike, "copies are not parts"
    monkeypatch.setattr(restore, "all_gather_list", lambda mine: [*mine * 3, mine[0] + 1])
    assert restore.fingerprint_of(engine, WEIGHT) != alike
