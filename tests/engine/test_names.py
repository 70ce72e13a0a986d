"""What a rank holds under a parameter's name are that parameter's values, or nothing is trained."""

import json
from pathlib import Path

import pytest

CPU = {"device": "cpu"}
HALVES = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True}}}


def sections() -> dict[str, dict]:
    """A `deepspeed` section of everything that decides where weights lie."""
    found = {}
    for stage in range(4):
        offloads = [{}, {"offload_optimizer": CPU}, {"offload_optimizer": CPU, "offload_param": CPU}]
        for precision, half in HALVES.items() if stage else [("fp32", {})]:
            for offload in offloads[: (1, 2, 2, 3)[stage]]:
                name = ", ".join([f"ZeRO {stage}", precision, *offload])
                found[name] = {"zero_optimization": {"stage": stage, **offload}, **half}
    return found


ALL = sections()
FEW = ("ZeRO 1, fp32", "ZeRO 2, fp16, offload_optimizer", "ZeRO 3, bf16")


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(ALL), marks=pytest.mark.long)], ids=["few", "all"])
def test_wrong_names_are_refused_on_every_rank_and_right_ones_are_not(names, ranks, tiny_config, tmp_path):
    right = {name: ALL[name] for name in names}
    assert len(ALL) == 1 + 2 * 3 * 2 + 3 * 3
    wrong = {
        f"round robin, ZeRO {stage}, {precision}": {
            "zero_optimization": {"stage": stage, "round_robin_gradients": True},
            **HALVES[precision],
        }
        # The optimizer that DeepSpeed has for bf16 under ZeRO 1 does not know of it.
        for stage, precision in ((1, "fp32"), (2, "fp32"), (2, "bf16"))
    }
    config = tiny_config(
        tmp_path / "names.json",
        model={"layers": 2, "width": 12, "mlp": 37, "heads": 2, "image_size": 16},
        train={"global_batch": 8, "steps": 2},
        schedule={"warmup_steps": 0},
        deepspeed={"zero_optimization": {"stage": 2}},
    )
    script = Path(__file__).with_name("names.py")
    ranks(2, script, tmp_path, json.dumps(right | wrong), config)
    told, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert told == other
    for name in right:
        assert told[name] is told.get(f"{name}, unset") is None, name
    for name in wrong:
        stage = name.partition("ZeRO ")[2][0]
        assert told[name].startswith(f"deepspeed: under ZeRO {stage}, DeepSpeed "), name
        assert "checkpoints would mix up the weights" in told[name]
    exchanged = told["two exchanged on rank 1"]
    assert "other values as blocks.0.mlp.fc1.weight, blocks.1.mlp.fc1.weight than the network" in exchanged
    assert "(seen by rank 1)" in exchanged
    assert "checkpoints would mix up the weights" in told["read back"]
