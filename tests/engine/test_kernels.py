"""Which kernels training may take: fp32 products in fp32, and, if a run asks for it, the same bits each time."""

import pytest
import torch

from pretrain.engine.step import deterministic

# Tells in each block's attention what torch may choose.
TELLING = """
import torch
from torch.nn import functional
attend = functional.scaled_dot_product_attention
def telling(*qkv):
    training, same = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    print("attention", training, same, torch.backends.cudnn.allow_tf32)
    return attend(*qkv)
functional.scaled_dot_product_attention = telling
"""


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_trains_with_the_kernels_that_it_asks_for(wanted, tiny_config, digits, run, tmp_path):
    config = tiny_config(tmp_path / "kernels.json", data={"eval": str(digits / "test")}, train={"steps": 2})
    # Two blocks: the last one attends for the class token without that function.
    words = ["--config", config, "--out", tmp_path / "run", f"train.deterministic={str(wanted).lower()}"]
    words.append("model.layers=2")
    done = run("launch/pretrain.py", *words, prelude=TELLING)
    assert done.returncode == 0, done.stderr
    told = {line for line in done.stdout.splitlines() if line.startswith("attention")}
    assert told == {f"attention {training} {wanted} False" for training in (True, False)}


def test_what_torch_may_choose_is_as_before_afterwards():
    for at_first in (False, True):
        torch.use_deterministic_algorithms(at_first)
        try:
            with deterministic(True):
                assert torch.are_deterministic_algorithms_enabled()
                assert not torch.utils.deterministic.fill_uninitialized_memory
            with deterministic(False):
                assert torch.are_deterministic_algorithms_enabled() == at_first
            assert torch.are_deterministic_algorithms_enabled() == at_first
            assert torch.utils.deterministic.fill_uninitialized_memory
        finally:
            torch.use_deterministic_algorithms(False)
