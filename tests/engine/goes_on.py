"""Train each variant once through, and once more stopped after its first step and resumed: one process group."""

import json
import sys
from pathlib import Path

from pretrain.configfile import read_config
from pretrain.engine import processgroup
from pretrain.ranks import collectives
from pretrain.run.config import RunConfig
from pretrain.run.experiment import run

config_file, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
world = processgroup.start()
for name, changes in variants.items():
    config = read_config(RunConfig, config_file, changes)
    assert run(config, out / name / "through", world) == 0
    halted = out / name / "halted"
    if world.main:
        halted.mkdir()
        (halted / "STOP").touch()
    collectives.barrier()
    assert run(config, halted, world) == 75
    assert run(config, halted, world) == 0
processgroup.stop()
