"""Samples that cannot be trained on: what a stream hands over in their place, and how they are reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pretrain.errors import InputError, StorageError
from pretrain.index.index import Index


class ChunkError(InputError):
    """A chunk cannot be read, or is not what the index says. Other ranks read other chunks.

    `passing`: storage is at fault, and may serve it later.
    """

    only_this_rank = True

    def __init__(self, reason: str, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


NOT_READ = "not read: another chunk could not be, or the stream was closed"


class Cause(NamedTuple):
    """Why a chunk could not be read, and whether that may pass."""

    reason: str
    passing: bool

    def error(self, before: str, behind: str = "") -> InputError:
        """What ends a run for it."""
        return (StorageError if self.passing else InputError)(f"{before}{self.reason}{behind}")


def first_cause(causes: list[Cause]) -> Cause:
    """Of several, in order, the first that does not merely follow another; one that stays before one that passes."""
    return min(causes, key=lambda cause: (cause.reason.startswith(NOT_READ), cause.passing))


@dataclass(frozen=True)
class Fault:
    """One sample of a batch that is grey and masked.

    `key` is None where its whole chunk could not be read, `passing` whether that may pass.
    """

    sample_id: int
    epoch: int
    key: str | None
    reason: str
    passing: bool = False

    @property
    def cause(self) -> Cause:
        """Why it could not be read."""
        return Cause(self.reason, self.passing)

    @property
    def of_chunk(self) -> bool:
        """Whether the shard is at fault, not this one image."""
        return self.key is None

    def record(self, index: Index) -> dict[str, Any]:
        """With its place: {"id", "epoch", "key", "url", "offset", "error"}; offset in bytes from the shard's begin."""
        (place,) = index.extents(np.array([self.sample_id]))
        return {
            "id": self.sample_id,
            "epoch": self.epoch,
            "key": self.key,
            "url": place.url,
            "offset": place.begin,
            "error": self.reason,
        }

    def describe(self, index: Index) -> str:
        """In one sentence, for the console."""
        if self.of_chunk:
            return self.reason
        found = self.record(index)
        return f"{found['url']}, byte {found['offset']}: sample {self.sample_id} ({self.key}): {self.reason}"
