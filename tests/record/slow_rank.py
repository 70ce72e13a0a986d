"""Two ranks of which rank 1 is slow in its forward pass, then rank 0 with its data: `slow_rank.py FOLDER`."""

import sys
import time
from pathlib import Path

from pretrain.engine import processgroup
from pretrain.ranks import collectives
from pretrain.record.folder import RunFolder
from pretrain.record.meters import Meters
from pretrain.stream.counters import Counters

world = processgroup.start()
meters = Meters(
    RunFolder(Path(sys.argv[1])),
    world,
    start=0,
    steps=4,
    every=2,
    global_batch=8,
    samples=80,
    flops_per_image=1,
    peak_flops=1.0,
    tensorboard=True,
    counters=Counters(),
)


def batches(step):
    time.sleep(0.6 if (world.rank, step // 2) == (0, 1) else 0.2)
    yield None


for step in range(4):
    for _ in meters.waiting(batches(step)):
        with meters.forward():
            time.sleep(0.9 if (world.rank, step // 2) == (1, 0) else 0.3)
    collectives.barrier()
    meters.step(step + 1, 1.0, 0.1, 2.0, skipped=False)
meters.close()
processgroup.stop()
