"""Samples that cannot be trained on: what a stream hands over in their place, and how they are reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.errors import InputError
from pretrain.stream.index import Index


class ChunkError(InputError):
    """A chunk cannot be read, or is not what the index says. Other ranks read other chunks."""

    only_this_rank = True


NOT_READ = "not read: another chunk could not be, or the stream was closed"


def first_cause(reasons: list[str]) -> str:
    """Of the reasons why chunks could not be read, in order, the first that does not merely follow another."""
    return min(reasons, key=lambda reason: reason.startswith(NOT_READ))


@dataclass(frozen=True)
class Fault:
    """One sample of a batch that is grey and masked. `key` is None where its whole chunk could not be read."""

    sample_id: int
    epoch: int
    key: str | None
    reason: str

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
