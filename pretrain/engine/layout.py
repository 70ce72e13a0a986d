"""How a global batch is divided among ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How a global batch is divided: ranks × accumulation × micro-batch."""

    global_batch: int
    micro_batch: int
    accumulation: int
    ranks: int

    @property
    def per_rank(self) -> int:
        """Images of a step on one rank."""
        return self.micro_batch * self.accumulation


def batch_layout(global_batch: int, micro_batch: int | None, ranks: int) -> Layout:
    """Divide `global_batch` into equal micro-batches; without `micro_batch` each rank takes one.

    Raises:
        InputError: the batch does not divide; the message names the nearest batches that do.
    """
    unit = ranks * (micro_batch or 1)
    if global_batch % unit:
        below, above = global_batch // unit * unit, (global_batch // unit + 1) * unit
        right = f"{below} or {above}" if below else f"{above}"
        by = f"{ranks} ranks × train.micro_batch {micro_batch}" if micro_batch else f"{ranks} ranks"
        raise InputError(
            f"train.global_batch: {global_batch} does not divide among {by}; {right} would"
            + (", or another train.micro_batch" if micro_batch else "")
        )
    micro = micro_batch or global_batch // ranks
    return Layout(global_batch, micro, global_batch // (ranks * micro), ranks)
