"""A rank's share of the training state at one step, on the host, while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.pieces import Piece
from pretrain.engine import hostmemory
from pretrain.engine.fragments import kinds, places, share
from pretrain.engine.quiet import get_accelerator

_SPARE = 1.1  # times the buffers' size must be free: what is measured is not all that will be taken


class Snapshot:
    """One buffer on the host, made with the first copy and used again by every other, page-locked on a GPU host."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._fragments = engine, share(engine)
        self.pieces: list[Piece] = [(part.name, part.begin, part.numel) for part in self._fragments]
        self.places = places(engine)
        self._buffers: dict[str, list[Tensor]] = {}

    @property
    def bytes(self) -> int:
        """Of a copy."""
        return 4 * len(kinds(self._engine)) * sum(part.numel for part in self._fragments)

    @property
    def memory(self) -> int:
        """Bytes of the host's memory that the buffers take."""
        if not _page_locks():
            return self.bytes
        count = len(kinds(self._engine))
        return count * (1 << (self.bytes // count - 1).bit_length())  # torch rounds each up to a power of two

    def lacks(self, ranks: int) -> str | None:
        """Why this host has no room for the buffers of its `ranks` ranks beside what training takes; None: it has."""
        room = hostmemory.available() - ranks * hostmemory.still_to_come()
        if self._buffers or _SPARE * ranks * self.memory <= room:
            return None
        return (
            f"a copy of what {ranks} ranks save takes {ranks * self.memory / 2**30:.1f} GiB of this host's memory, "
            f"training leaves {max(room, 0) / 2**30:.1f}"
        )

    def values(self) -> dict[str, Sequence[Tensor]]:
        """By kind, the fp32 values of each of `pieces`: the engine's own, which the next step will change."""
        optimizer = self._engine.basic_optimizer
        return {kind: [part.view(optimizer, kind) for part in self._fragments] for kind in kinds(self._engine)}

    @torch.no_grad()
    def take(self) -> dict[str, Sequence[Tensor]]:
        """A copy of `values` as they are now, until the next one is taken."""
        views = self.values()
        sizes = [part.numel for part in self._fragments]
        for kind in views if not self._buffers else ():
            buffer = torch.empty(sum(sizes))
            if _page_locks():
                buffer = get_accelerator().pin_memory(buffer)
            self._buffers[kind] = list(buffer.split(sizes))
        for kind, copies in self._buffers.items():
            for copy, view in zip(copies, views[kind], strict=True):
                copy.copy_(view, non_blocking=True)
        get_accelerator().synchronize()
        return dict(self._buffers)


def _page_locks() -> bool:
    return get_accelerator().device_name() != "cpu"
