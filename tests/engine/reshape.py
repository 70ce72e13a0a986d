"""Continue one run on this many ranks, under each of the given variants: one process group.

argv: the config, the run to go on from (a folder), where to put the copies, variants {name: changes} as JSON.
"""

import json
import shutil
import sys
from pathlib import Path

from pretrain.configfile import read_config
from pretrain.engine import processgroup
from pretrain.ranks import collectives
from pretrain.run.config import RunConfig
from pretrain.run.experiment import run

config_file, begun, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
world = processgroup.start()
for name, changes in variants.items():
    config = read_config(RunConfig, config_file, changes)
    if world.main and begun.exists():
        shutil.copytree(begun, out / name)
    collectives.barrier()
    assert run(config, out / name, world) == 0
processgroup.stop()
