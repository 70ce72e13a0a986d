"""The host reads from the device once a step: the losses and the norm, before the update."""

import json
from pathlib import Path

import pytest

HALVES = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}},
}
ALL = {
    f"ZeRO {stage}, {precision}": {"zero_optimization": {"stage": stage}, **half}
    for stage in (0, 1, 2, 3)
    for precision, half in HALVES.items()
    if stage > 0 or precision == "fp32"
}
FEW = "ZeRO 0, fp32", "ZeRO 1, fp32", "ZeRO 1, bf16", "ZeRO 2, fp16", "ZeRO 3, bf16"


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(ALL), marks=pytest.mark.long)], ids=["few", "all"])
def test_a_step_reads_from_the_device_once(names, ranks, tmp_path):
    ranks(2, Path(__file__).with_name("waits.py"), tmp_path, json.dumps({name: ALL[name] for name in names}))
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told == {name: {"step.py agree": 1} for name in names}
