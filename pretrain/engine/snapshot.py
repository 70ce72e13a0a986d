"""A rank's share of the training state at one step, on the host, while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.engine.checkpoint import Piece
from pretrain.engine.fragments import kinds, places, share
from pretrain.engine.quiet import get_accelerator


class Snapshot:
    """One buffer on the host, used again by every save: as large as what this rank writes, page-locked on a GPU host.

    Without `copies` there is no buffer, and the values are the engine's own: whoever writes them must be done before
    the next step.
    """

    def __init__(self, engine: Any, *, copies: bool) -> None:
        self._engine, self._fragments = engine, share(engine)
        self.pieces: list[Piece] = [(part.name, part.begin, part.numel) for part in self._fragments]
        self.places = places(engine)
        self._buffers: dict[str, list[Tensor]] = {}
        if copies:
            sizes = [part.numel for part in self._fragments]
            for kind in kinds(engine):
                buffer = torch.empty(sum(sizes))
                if get_accelerator().device_name() != "cpu":
                    buffer = get_accelerator().pin_memory(buffer)
                self._buffers[kind] = list(buffer.split(sizes))

    @torch.no_grad()
    def take(self) -> dict[str, Sequence[Tensor]]:
        """By kind, the fp32 values of each of `pieces` as they are now."""
        optimizer = self._engine.basic_optimizer
        views = {kind: [part.view(optimizer, kind) for part in self._fragments] for kind in kinds(self._engine)}
        if not self._buffers:
            return dict(views)
        for kind, copies in self._buffers.items():
            for copy, view in zip(copies, views[kind], strict=True):
                copy.copy_(view, non_blocking=True)
        get_accelerator().synchronize()
        return dict(self._buffers)
