"""A benchmark's own command again, as the ranks of one group on this host."""

from __future__ import annotations

import os
import subprocess
import sys

from pretrain.ranks.launcher import free_port


def is_rank() -> bool:
    """Whether this process is one of them."""
    return "RANK" in os.environ


def launch(count: int, *words: str) -> int:
    """Start the ranks, with further `words`, and wait; the worst status. On a CPU host each has one thread."""
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = {"OMP_NUM_THREADS": "1", **os.environ, **place}
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv, *words], env={**settings, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(count)
    ]
    return max(abs(rank.wait()) for rank in ranks)
