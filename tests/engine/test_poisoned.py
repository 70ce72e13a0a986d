"""A gradient that is not finite on one rank reaches no weight on any, and the next step is made as ever."""

import json
from pathlib import Path

import pytest

from tests.conftest import RANKS

CPU = {"device": "cpu"}
HALVES = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
}
ALL = {
    f"ZeRO {stage}, {precision}{', optimizer on the CPU' if offload else ''}": {
        "zero_optimization": {"stage": stage, **({"offload_optimizer": CPU} if offload else {})},
        **half,
    }
    for stage in (0, 1, 2, 3)
    for precision, half in HALVES.items()
    for offload in (False, True)
    if stage > 0 or (precision == "fp32" and not offload)
}
FEW = (
    "ZeRO 0, fp32", "ZeRO 1, fp32", "ZeRO 1, bf16, optimizer on the CPU", "ZeRO 2, fp16",
    "ZeRO 2, fp32, optimizer on the CPU", "ZeRO 3, bf16", "ZeRO 3, fp16, optimizer on the CPU",
)  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(ALL), marks=pytest.mark.long)], ids=["few", "all"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_forgotten(names, ranks, tmp_path):
    assert len(ALL) == 1 + 3 * 3 * 2
    sections = {name: ALL[name] for name in names}
    ranks(RANKS, Path(__file__).with_name("poisoned.py"), tmp_path, json.dumps(sections))
    of_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for of_rank in of_ranks:
        assert list(of_rank) == list(sections)
        for name, told in of_rank.items():
            assert told == {"changed": [True, False, True], "finite": True}, name
