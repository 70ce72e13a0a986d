"""Train the proof's small network through the real experiment once per ZeRO stage and accumulation: one process group."""

import sys
from pathlib import Path

from pretrain.engine import distributed
from pretrain.run.config import RunConfig, read_config
from pretrain.run.experiment import fresh, run

config_file, out = Path(sys.argv[1]), Path(sys.argv[2])
world = distributed.start()
for stage in (0, 1, 2, 3):
    for accumulation in (1, 2):
        changes = [
            f"deepspeed.zero_optimization.stage={stage}",
            f"train.micro_batch={16 // world.size // accumulation}",
        ]
        config = read_config(RunConfig, config_file, changes)
        run(config, out / f"zero{stage}_ranks{world.size}_accumulation{accumulation}", world, fill=fresh(config))
distributed.stop()
