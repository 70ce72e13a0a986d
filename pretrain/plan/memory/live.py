"""Bytes of the tensors that live while operations run, counted without computing anything."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, counts the storage of each tensor that an operation makes, until the last tensor that shares it is gone.

    Attributes:
        live: bytes now.
        peak: the most since `restart`, or since it began.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """`known`: tensors that were there before and do not count."""
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in known:
            self._add(tensor.untyped_storage(), counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    def _add(self, storage: torch.UntypedStorage, counted: bool = True) -> None:
        address = storage._cdata
        if address in self._seen:
            return
        size = storage.nbytes() if counted else 0

        def gone(_: object) -> None:
            del self._seen[address]
            self.live -= size

        self._seen[address] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
