"""Train variants of a config one after another, in one process group: variants.py CONFIG OUT VARIANTS [BEGUN].

VARIANTS is {name: overrides} as JSON; each run is OUT/name. One whose name ends with "halted" is stopped after its
first step and resumed. BEGUN: a run folder; each variant resumes a copy of it.
"""

import json
import shutil
import sys
from pathlib import Path

from pretrain.configfile import read_config
from pretrain.engine import processgroup
from pretrain.engine.quiet import get_accelerator
from pretrain.ranks import collectives
from pretrain.training.config import RunConfig
from pretrain.training.experiment import run

config_file, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
world = processgroup.start()
get_accelerator().is_fp16_supported = lambda: True  # torch computes in it on any CPU, if slowly; DeepSpeed would refuse
for name, changes in variants.items():
    config = read_config(RunConfig, config_file, changes)
    if config.train.compile:
        import torch

        torch._dynamo.reset()  # torch counts the graphs of a function over all networks that were ever compiled
    if world.main and sys.argv[4:]:
        shutil.copytree(sys.argv[4], out / name)
    if name.endswith("halted"):
        if world.main:
            (out / name).mkdir(parents=True)
            (out / name / "STOP").touch()
        collectives.barrier()
        assert run(config, out / name, world) == 75
    collectives.barrier()
    assert run(config, out / name, world) == 0
processgroup.stop()
