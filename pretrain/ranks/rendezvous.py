"""While the ranks of a run meet: which of them are waited for, and where."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

import torch.distributed as dist

from pretrain.console import say

_FIRST, _LONGEST = 10.0, 300.0  # seconds until the first line, and at most between two: each pause doubles
_HINT = "(a firewall? another interface: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"


@contextmanager
def announced(env: Mapping[str, str], first: float = _FIRST) -> Iterator[None]:
    """While the ranks meet inside, one rank of each host prints from time to time, on stderr, which have not come.

    Args:
        env: this rank's, with the variables of `launcher.rank_variables`.
        first: seconds until the first line.
    """
    over = threading.Event()
    if int(env["WORLD_SIZE"]) > 1:
        # sys.stderr is looked up now: what libraries print inside is held back.
        threading.Thread(target=_report, args=(env, first, sys.stderr, over), name="meeting", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def ranks_text(ranks: Sequence[int]) -> str:
    """Sorted ranks in a few words: rank 3; ranks 0-2, 5."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return f"rank{'s' * (len(ranks) > 1)} " + ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def _report(env: Mapping[str, str], first: float, console: TextIO, over: threading.Event) -> None:
    """Note in the store that this rank has come; the first rank of each host prints who has not."""
    rank, size, port = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["MASTER_PORT"])
    host, began = env["MASTER_ADDR"], time.monotonic()
    # A store may outlive its ranks, as torchrun's does when it restarts them.
    keys = [f"vit-foundry/met/{env.get('TORCHELASTIC_RESTART_COUNT', 0)}/{number}" for number in range(size)]
    store, due, pause, why = None, began + first, first, ""
    while not over.wait(min(1.0, first)):  # no connection where the ranks have met by then
        try:
            if store is None:
                socket.create_connection((host, port), timeout=5).close()  # says why not, as the store does not
                store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
                store.set(keys[rank], "")
            if time.monotonic() < due or int(env["LOCAL_RANK"]):
                continue  # what is asked grows with the square of the ranks, and one store answers all
            missing = [number for number in range(size) if not store.check([keys[number]])]
        except (OSError, RuntimeError) as error:
            store, missing, why = None, [0], getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if time.monotonic() < due or int(env["LOCAL_RANK"]) or over.is_set():
            continue
        if store is None:
            what = f"rank 0 to answer at {host}:{port}: {why}; is it started, and is that the way to it? {_HINT}"
        elif missing:
            what = f"{len(missing)} of {size} ranks to meet at {host}:{port}: {ranks_text(missing)}; are they started, "
            what += f"and is that the way to rank 0? {_HINT}"
        else:
            what = f"all {size} ranks, which have met at {host}:{port}, to connect with one another {_HINT}"
        waited = time.monotonic() - began
        say(f"rank {rank} ({socket.gethostname()}): waiting {waited:.0f} s for {what}", to=console)
        pause = min(2 * pause, _LONGEST)
        due = time.monotonic() + pause
