"""A rank that waits to be asked to stop: `stops.py FOLDER RANK [MINUTES]`; prints why and ends with status 75."""

import sys
import time
from pathlib import Path

import torch

from pretrain.ranks.collectives import World
from pretrain.ranks.stop import Stop

folder, rank, minutes = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else None
stop = Stop(folder, World(rank, 2, rank, torch.device("cpu")), minutes)
assert not stop.asked()
print("ready", flush=True)
while not stop.asked():
    time.sleep(0.05)
print(stop.reason, flush=True)
if stop.reason == "SIGINT":
    time.sleep(1.5 if rank else 60)  # saves, and may be interrupted
stop.done()
sys.exit(75)
