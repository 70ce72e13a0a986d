"""Two ranks of which rank 1 is slow in its forward pass, then rank 0 with its data: `slow_rank.py FOLDER`."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

from pretrain.engine import processgroup
from pretrain.engine.step import Update
from pretrain.ranks import collectives
from pretrain.record.folder import RunFolder
from pretrain.record.metrics import Metrics, Workload
from pretrain.record.pulse import Pulse
from pretrain.record.section import LoggingSection
from pretrain.stream.counters import Counters

world = processgroup.start()
metrics = Metrics(
    RunFolder(Path(sys.argv[1])),
    world,
    LoggingSection(every=2),
    Workload(steps=4, global_batch=8, samples=80, flops_per_image=1, peak_flops=1.0),
    Counters(),
)
pulse = Pulse(SimpleNamespace(beat=lambda step, part: None), world.device)


def batches(step):
    time.sleep(0.6 if (world.rank, step // 2) == (0, 1) else 0.2)
    yield None


for step in range(4):
    for _ in pulse.batches(step, batches(step)):
        with pulse.forward(step):
            time.sleep(0.9 if (world.rank, step // 2) == (1, 0) else 0.3)
    collectives.barrier()
    metrics.step(step + 1, 1.0, Update(0.1, 2.0, None), pulse)
metrics.close()
processgroup.stop()
