"""Bytes of the tensors that live while operations run, counted without computing anything."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, counts the storage of each tensor that an operation makes, until the last tensor that shares it is gone.

    Attributes:
        live: bytes now, but for those set aside.
        peak: the most of it since `restart`, or since it began.
        peak_with_aside: the most of `live` and what is set aside together.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """`known`: tensors that were there before and do not count."""
        super().__init__()
        self.live = self.peak = self.peak_with_aside = self._aside = 0
        self._seen: dict[int, _Storage] = {}
        for tensor in known:
            self._add(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return made

    def set_aside(self, tensor: Tensor) -> None:
        """Count a tensor's storage apart from now on."""
        storage = self._seen[tensor.untyped_storage()._cdata]
        self.live -= storage.size
        self._aside += storage.size
        storage.aside = True

    def restart(self) -> None:
        """Begin new peaks."""
        self.peak, self.peak_with_aside = self.live, self.live + self._aside

    def _add(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._seen:
            return

        def gone(_: object) -> None:
            found = self._seen.pop(address)
            if found.aside:
                self._aside -= found.size
            else:
                self.live -= found.size

        self._seen[address] = _Storage(weakref.ref(storage, gone), storage.nbytes() if counted else 0)
        self.live += self._seen[address].size
        self.peak = max(self.peak, self.live)
        self.peak_with_aside = max(self.peak_with_aside, self.live + self._aside)


@dataclass
class _Storage:
    reference: Any  # weak; kept so that it tells when the storage is gone
    size: int
    aside: bool = False
