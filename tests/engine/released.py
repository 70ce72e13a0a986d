"""One run after the other in one process, under every ZeRO stage: each frees what it held."""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.configfile import read_config
from pretrain.engine import processgroup
from pretrain.engine.engine import free_memory
from pretrain.ranks.stop import Stop
from pretrain.training.config import RunConfig
from pretrain.training.experiment import run

config, out = Path(sys.argv[1]), Path(sys.argv[2])
world = processgroup.start()
stop, groups = Stop(out, world), []
for stage in (0, 1, 2, 3, 3):
    zero = json.dumps({"zero_optimization": {"stage": stage}})
    run(
        read_config(RunConfig, config, [f"deepspeed={zero}"]),
        out / f"run{len(list(out.glob('run*')))}",
        world,
        stop=stop,
    )
    free_memory()
    held = [tuple(one.shape) for one in gc.get_objects() if torch.is_tensor(one) and one.numel() > 500]
    groups.append(len(dist.distributed_c10d._world.pg_map))
    assert not held, f"ZeRO {stage}: {held}"
assert len(set(groups)) == 1, f"process groups after each run: {groups}"
processgroup.stop()
