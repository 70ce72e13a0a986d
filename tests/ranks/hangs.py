"""Runs that go wrong at their second step, side by side: `hangs.py FOLDER` (see test_watchdog.py).

Each rank is a fork of this process, which has imported everything. A run's folder holds what its ranks said; the exit
statuses of all are in FOLDER/statuses.json.
"""

import json
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.ranks.collectives import World
from pretrain.ranks.launcher import free_port
from pretrain.ranks.watchdog import Watchdog


def sleep_in_forward():
    time.sleep(60)


def hold_the_interpreter():
    os.nice(19)  # leave the core to the others
    re.match(r"(a+)+$", "a" * 40 + "b")  # for hours, and no other thread runs


WRONG = {
    "sleeps": sleep_in_forward,
    "holds": hold_the_interpreter,
    "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "saves": lambda: time.sleep(6),
    "raises": lambda: 1 / 0,
    "mute": sleep_in_forward,  # where neither a message nor a stack can be written
}
# What goes wrong, with which rank, of how many.
RUNS = [
    *(("sleeps", 0, 1), ("holds", 0, 1), ("mute", 0, 1), ("frozen", 0, 2), ("killed", 0, 2)),
    *((wrong, 1, 2) for wrong in WRONG if wrong != "mute"),
]


def train(folder: Path, wrong: str, wrong_rank: int, rank: int, size: int) -> None:
    world = World(rank, size, rank, torch.device("cpu"))
    if size > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with Watchdog(folder, world, hang=3.0, slow=9.0, every=0.6) as watchdog:
        for step in range(4):
            watchdog.beat(step, "forward")
            time.sleep(0.8)  # a sign or two
            if (step, rank) == (1, wrong_rank):
                if wrong == "saves":
                    watchdog.beat(step, "save")
                WRONG[wrong]()
            watchdog.beat(step, "backward")
            if size > 1:
                dist.all_reduce(torch.ones(1))


def fork(folder: Path, wrong: str, wrong_rank: int, rank: int, size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    said = folder / f"said{rank}"
    if wrong == "mute":
        (folder / "hangs").mkdir(exist_ok=True)
        for file in (said, folder / "hangs" / f"rank_{rank:05d}.txt"):
            file.symlink_to("/dev/full")
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    status = 1
    try:
        train(folder, wrong, wrong_rank, rank, size)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def main(out: Path) -> None:
    ranks, ports = {}, set()
    while len(ports) < len(RUNS):
        ports.add(free_port())
    for (wrong, wrong_rank, size), port in zip(RUNS, ports, strict=True):
        name = f"{wrong}_{wrong_rank}_of_{size}"
        (out / name).mkdir()
        for rank in range(size):
            stays = size > 1 and rank == wrong_rank and wrong in ("frozen", "holds")
            ranks[name, rank] = stays, fork(out / name, wrong, wrong_rank, rank, size, port)
    statuses, deadline = {}, time.monotonic() + 50
    while time.monotonic() < deadline and any(key not in statuses for key, (stays, _) in ranks.items() if not stays):
        for key, (_, child) in ranks.items():
            if key not in statuses and (ended := os.waitpid(child, os.WNOHANG))[0]:
                statuses[key] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.1)
    for key, (_, child) in ranks.items():
        if key not in statuses:
            os.kill(child, signal.SIGKILL)  # a launcher's part: what stays is not able to end itself
            os.waitpid(child, 0)
            statuses[key] = "stayed"
    (out / "statuses.json").write_text(json.dumps([[*key, status] for key, status in statuses.items()]))


main(Path(sys.argv[1]))
