"""An fp32 run under ZeRO 1 and 2 holds weights and gradients once, and trains to the same bits as if it did not."""

import json
from pathlib import Path

import pytest

from pretrain.engine.zero.once import hold_once

ONCE = {  # few values a bucket: some hold many parameters, some a part of a group, and some a single one
    f"ZeRO {stage}, bucket {bucket}, {frozen} frozen": ({"stage": stage, "reduce_bucket_size": bucket}, frozen)
    for stage, bucket, frozen in ((1, 50_000_000, 0), (1, 500, 2), (2, 500, 2))
}
AS_DEEPSPEED = {
    "overlapped": {"stage": 1, "overlap_comm": True},
    "scattered": {"stage": 2, "reduce_scatter": True},
    "on the host": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
}


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 3])
def test_held_once_or_not_the_bits_are_the_same(count, ranks, tmp_path):
    script = Path(__file__).with_name("once.py")
    ranks(count, script, tmp_path, json.dumps(ONCE), json.dumps(AS_DEEPSPEED))
    for rank in range(count):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        once = {key: {"once": True, "norms": True, "values": True} for key in ONCE}
        assert told == once | {key: {"once": False} for key in AS_DEEPSPEED}


def test_an_optimizer_that_is_not_as_expected_is_left_alone():
    class Engine:
        optimizer = object()

    assert not hold_once(Engine)
