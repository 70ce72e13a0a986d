"""Samples that could not be read: what a stream hands over in their place, and how they are reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.errors import InputError, StorageError
from pretrain.index.index import Index

NOT_READ = "not read: another chunk could not be, or the stream was closed"


class ChunkError(InputError):
    """A chunk cannot be read, or is not what the index says. Other ranks read other chunks.

    `passing`: storage is at fault, and may serve it later.
    """

    only_this_rank = True

    def __init__(self, reason: str, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True)
class Fault:
    """One sample of a batch that is grey and masked.

    `key` is None where its whole chunk could not be read; `passing`: storage may serve it later.
    """

    sample_id: int
    epoch: int
    key: str | None
    reason: str
    passing: bool = False

    @property
    def of_chunk(self) -> bool:
        """Whether the shard is at fault, not this one image."""
        return self.key is None

    @property
    def secondary(self) -> bool:
        """Whether it was not read only because another chunk could not be."""
        return self.reason.startswith(NOT_READ)

    def error(self, before: str, after: str = "") -> InputError:
        """The error that ends a run because of it, with text before and after the reason."""
        return (StorageError if self.passing else InputError)(f"{before}{self.reason}{after}")

    def record(self, index: Index) -> dict[str, Any]:
        """{"id", "epoch", "key", "url", "offset", "error"}; offset in bytes from the shard's begin."""
        (extent,) = index.extents(np.array([self.sample_id]))
        return {
            "id": self.sample_id,
            "epoch": self.epoch,
            "key": self.key,
            "url": extent.url,
            "offset": extent.begin,
            "error": self.reason,
        }

    def describe(self, index: Index) -> str:
        """In one sentence, for the console."""
        if self.of_chunk:
            return self.reason
        found = self.record(index)
        return f"{found['url']}, byte {found['offset']}: sample {self.sample_id} ({self.key}): {self.reason}"


def first_fault(faults: Sequence[Fault]) -> Fault:
    """The first that is no consequence of another; permanent faults come before passing ones."""
    return min(faults, key=lambda fault: (fault.secondary, fault.passing))
