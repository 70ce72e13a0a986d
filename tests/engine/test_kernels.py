"""Which kernels training may take: products of an fp32 run are computed in fp32."""

# Tells in each block's attention what torch may choose.
TELLING = """
import torch
from torch.nn import functional
attend = functional.scaled_dot_product_attention
def telling(*qkv):
    print("attention", torch.backends.cudnn.allow_tf32)
    return attend(*qkv)
functional.scaled_dot_product_attention = telling
"""


def test_convolutions_of_fp32_are_computed_in_fp32(tiny_config, run, tmp_path):
    config = tiny_config(tmp_path / "kernels.json", train={"steps": 2})
    done = run("launch/pretrain.py", "--config", config, "--out", tmp_path / "run", prelude=TELLING)
    assert done.returncode == 0, done.stderr
    assert {line for line in done.stdout.splitlines() if line.startswith("attention")} == {"attention False"}
