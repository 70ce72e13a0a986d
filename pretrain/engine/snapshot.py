"""A rank's share of the training state, copied to the host's memory so that training continues while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.pieces import Piece
from pretrain.engine.fragments import kinds, parameter_begins, share
from pretrain.engine.quiet import get_accelerator
from pretrain.hostmemory import available_memory, released_memory

_SPARE = 1.1  # times the buffers' size must be free: what is measured is not all that will be taken


class Snapshot:
    """One buffer on the host, allocated with the first copy and reused by all others, page-locked on a GPU host."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._fragments = engine, share(engine)
        self.pieces: list[Piece] = [(part.name, part.begin, part.numel) for part in self._fragments]
        self.begins = parameter_begins(engine)
        self._buffers: dict[str, list[Tensor]] = {}

    @property
    def bytes(self) -> int:
        """The size of a copy."""
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
        room = available_memory() - ranks * released_memory()
        if self._buffers or _SPARE * ranks * self.memory <= room:
            return None
        return (
            f"a copy of what {ranks} ranks save takes {ranks * self.memory / 2**30:.1f} GiB of this host's memory, "
            f"training leaves {max(room, 0) / 2**30:.1f}"
        )

    def values(self) -> dict[str, Sequence[Tensor]]:
        """By kind, the fp32 values [n] of each of `pieces`: the engine's own memory, which the next step changes."""
        return {kind: [view.float() for view in views] for kind, views in self._views().items()}  # fp32: no copy

    @torch.no_grad()
    def take(self) -> dict[str, Sequence[Tensor]]:
        """A copy of `values` as they are now, valid until the next one is taken."""
        views = self._views()
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

    def _views(self) -> dict[str, list[Tensor]]:
        optimizer = self._engine.basic_optimizer
        return {kind: [part.view(optimizer, kind) for part in self._fragments] for kind in kinds(self._engine)}


def _page_locks() -> bool:
    return get_accelerator().device_name() != "cpu"
