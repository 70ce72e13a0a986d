"""Planned memory within a tenth of what real ranks take on the CPU; states to the byte."""

from __future__ import annotations

import pytest

from benchmarks.memory import Case, measure
from pretrain.plan.memory.rank import rank_memory

CASES = [
    Case("vit_ti_16", 1, 1, 8, "none"),
    Case("vit_ti_16", 2, 2, 4, 3),
    Case("vit_ti_16", 3, 2, 8, "selective"),
    Case("vit_ti_16", 2, 1, 1, "full", 2),
    Case("vit_ti_16", 3, 1, 1, "none", 2),
    Case("vit_b_16", 0, 1, 4, "full"),
    Case("vit_b_16", 1, 2, 1, "none", 2),
    Case("vit_b_16", 2, 1, 8, "selective"),
    Case("vit_b_16", 3, 2, 1, "full"),
]


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.arch}-{case.stage}-{case.ranks}-{case.checkpointing}")
def test_planned_is_measured(case):
    planned, measured = rank_memory(case.job()), measure(case)
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(planned, part) == getattr(measured, part), part
    assert planned.allocated + planned.outside == pytest.approx(measured.peak, rel=0.1)
