"""Train the proof's small network through the real experiment, one run after another in one process group."""

import json
import sys
from pathlib import Path

import torch

from pretrain.configfile import read_config
from pretrain.engine import processgroup
from pretrain.engine.quiet import get_accelerator
from pretrain.run.config import RunConfig
from pretrain.run.experiment import run

config_file, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
world = processgroup.start()
get_accelerator().is_fp16_supported = lambda: True  # torch computes in it on any CPU, if slowly; DeepSpeed would refuse
for name, changes in variants.items():
    torch._dynamo.reset()  # torch counts the graphs of a function over all networks that were ever compiled
    config = read_config(RunConfig, config_file, changes)
    run(config, out / name, world)
processgroup.stop()
