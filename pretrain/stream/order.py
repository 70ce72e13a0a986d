"""The order of samples: canonical lanes over a keyed permutation of small chunks, evaluated at any position.

The canonical id u in [0, N) counts samples in index order; chunk c holds ids [c·g, (c+1)·g). Slot s of step t
is stream position x = t·B + s, in epoch x div N. Within an epoch the whole chunks, permuted by the epoch's
keys, are dealt to V lanes, and neighbouring positions come from neighbouring lanes. There is no table and no
generator state: any position of any epoch costs the same, so a run's position in its data is the one integer x.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import InputError
from pretrain.hashing import CHUNKS, WITHIN_CHUNK, hash_words, mix64, stream64

# The hash, the rounds, the tie-breaks and the layout below are this version: changing any makes a new one.
ORDER_VERSION = 1
_ROUNDS = 8

Positions = NDArray[np.int64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Which sample comes at which position: a pure function of its fields, which a run never changes.

    samples: N.
    global_batch: B.
    chunk: g, how many samples are read together.
    lanes: V; by default B·clamp(⌊N/(64·g·B)⌋, 1, 4).

    Raises InputError naming the field that is out of range.
    """

    samples: int
    global_batch: int
    seed: int
    chunk: int = 8
    lanes: int | None = None
    lane_count: int = field(init=False, repr=False, compare=False)  # `lanes` with the default filled in

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("global_batch", 1), ("seed", 0), ("chunk", 1)):
            self._set_integer(name, low)
        if self.lanes is None:
            wide = self.samples // (64 * self.chunk * self.global_batch)
            object.__setattr__(self, "lanes", self.global_batch * min(max(wide, 1), 4))
        self._set_integer("lanes", 1)
        object.__setattr__(self, "lane_count", self.lanes)

    def _set_integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        try:
            number = operator.index(value)
        except TypeError:
            number = low - 1
        # 2^53: the state is written as JSON, and positions stay far from the end of int64.
        if isinstance(value, bool) or not low <= number < 1 << 53:
            raise InputError(f"order: {name} is {value!r}; an integer from {low} to 2^53 - 1 would be right")
        object.__setattr__(self, name, number)

    def ids(self, step: int, begin: int = 0, end: int | None = None) -> Ids:
        """Canonical ids of slots [begin, end) of `step` (all from 0), in slot order: int64 [end - begin]."""
        return self.at(self.positions(step, begin, end))

    def epochs(self, step: int, begin: int = 0, end: int | None = None) -> NDArray[np.int64]:
        """The epoch, from 0, of slots [begin, end) of `step`: int64 [end - begin]."""
        return self.positions(step, begin, end) // self.samples

    def positions(self, step: int, begin: int = 0, end: int | None = None) -> Positions:
        """Stream positions of slots [begin, end) of `step`. Raises InputError outside the batch."""
        end = self.global_batch if end is None else end
        if step < 0 or not 0 <= begin <= end <= self.global_batch:
            raise InputError(
                f"order: step {step}, slots [{begin}, {end}); steps count from 0, slots lie in [0, {self.global_batch})"
            )
        if (step + 1) * self.global_batch > 1 << 62:
            raise InputError(
                f"order: step {step} of batches of {self.global_batch}; positions up to 2^62 would be right"
            )
        return np.arange(step * self.global_batch + begin, step * self.global_batch + end, dtype=np.int64)

    def at(self, positions: Positions) -> Ids:
        """Canonical ids at any stream positions: [n] -> int64 [n]; a bijection of [0, N) in each epoch."""
        if positions.size == 0:
            return np.empty(0, np.int64)
        epoch, place = np.divmod(positions, self.samples)
        whole = place < self._whole_samples
        if whole.all():
            return self._shuffled(epoch, place)
        ids = place.copy()
        if whole.any():
            ids[whole] = self._shuffled(epoch[whole], place[whole])
        return ids

    def siblings(self, positions: Positions) -> Positions:
        """Positions of all samples of the chunk at each position, ascending: [n] -> [n, g], padded with -1.

        So a rank knows, when it first needs a chunk, which of its samples it will be asked for.
        """
        epoch, place = np.divmod(positions, self.samples)
        g, head, rest = self.chunk, self._head, self._rest
        lane, depth = place % self.lane_count, place // self.lane_count
        first, stride = lane + depth // g * g * self.lane_count, np.full_like(place, self.lane_count)
        left = place >= head
        if rest:
            first[left], stride[left] = head + (place[left] - head) % rest, rest
        tail = place >= self._whole_samples
        first[tail], stride[tail] = self._whole_samples, 1
        places = first[:, None] + stride[:, None] * np.arange(g)
        return np.where(places < self.samples, places + (epoch * self.samples)[:, None], -1)

    def state(self, index_hash: str, step: int) -> dict[str, int | str]:
        """What a checkpoint holds after `step` whole steps: JSON, under 1 KB, the same on every rank."""
        return {**self._frozen(index_hash), "position": step * self.global_batch}

    def check(self, state: Mapping[str, Any], index_hash: str, sequence: str = "") -> int:
        """The step to resume from. Raises InputError naming each difference between `state` and this order.

        `sequence` is the index's hash of keys, labels and offsets. A run whose index recorded no content has it as its
        index_hash, and may resume with an index that does record content.
        """
        frozen = self._frozen(index_hash)
        if sequence and state.get("index_hash") == sequence:
            frozen["index_hash"] = sequence
        missing = [name for name in (*frozen, "position") if name not in state]
        if missing:
            raise InputError(f"stream state: no {', '.join(missing)}; not a state of this program's stream")
        changed = [f"{name} was {state[name]!r}, is {now!r}" for name, now in frozen.items() if state[name] != now]
        if changed:
            # This index records no content, so its data may be those of the run.
            blind = frozen["index_hash"] == sequence != state["index_hash"]
            hint = (
                " (this index does not hold all shards' sha256: index them again with it to compare)" if blind else ""
            )
            raise InputError(
                f"the order of samples, or what they hold, would change: {'; '.join(changed)}{hint}. Resume with the "
                "data and settings that the run was started with, or start a new run from its weights"
            )
        position = state["position"]
        batch = self.global_batch
        if type(position) is not int or position < 0 or position % batch:
            raise InputError(f"stream state: position is {position!r}; a multiple of {batch}, the batch, is right")
        return position // batch

    def _frozen(self, index_hash: str) -> dict[str, int | str]:
        return {
            "order_version": ORDER_VERSION,
            "index_hash": index_hash,
            "seed": self.seed,
            "samples": self.samples,
            "global_batch": self.global_batch,
            "lanes": self.lane_count,
            "chunk": self.chunk,
        }

    # M whole chunks: ⌊M/V⌋ to each lane (the head of an epoch), M mod V left over, then fewer than g samples.

    @property
    def _chunks(self) -> int:
        return self.samples // self.chunk

    @property
    def _whole_samples(self) -> int:
        return self._chunks * self.chunk

    @property
    def _lane_samples(self) -> int:
        return self._chunks // self.lane_count * self.chunk

    @property
    def _head(self) -> int:
        return self.lane_count * self._lane_samples

    @property
    def _rest(self) -> int:
        return self._chunks % self.lane_count

    def _shuffled(self, epoch: NDArray[np.int64], place: NDArray[np.int64]) -> Ids:
        """Ids at places before the epoch's tail."""
        g, head, rest = self.chunk, self._head, self._rest
        dealt = place % self.lane_count * self._lane_samples + place // self.lane_count
        if rest:
            left = place - head
            dealt = np.where(left < 0, dealt, head + left % rest * g + left // rest)
        slot, within = np.divmod(dealt, g)
        if (epoch == epoch[0]).all():
            epoch = epoch[:1]
        chunk = _permute(slot.astype(np.uint64), self._chunks, self.seed, epoch)
        if g > 1:
            within = _rank_of(within, g, hash_words(WITHIN_CHUNK, self.seed, epoch, chunk))
        return chunk.astype(np.int64) * g + within


def _permute(values: NDArray[np.uint64], size: int, seed: int, epoch: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A keyed permutation of [0, size) applied to each value; `epoch` has length 1 or that of the values.

    Alternating Feistel rounds on the smallest power of two that holds `size`, walked until inside it.
    """
    bits = (size - 1).bit_length()
    low_bits, high_bits = np.uint64((bits + 1) // 2), np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64((1 << int(n)) - 1) for n in (low_bits, high_bits))
    keys = [hash_words(CHUNKS, seed, epoch, number) for number in range(_ROUNDS)]
    result = np.empty_like(values)
    outside = np.arange(len(values))
    while len(outside):
        low, high = values & low_mask, values >> low_bits
        for number, key in enumerate(keys):
            if number % 2:
                low ^= mix64(high ^ key) & low_mask
            else:
                high ^= mix64(low ^ key) & high_mask
        values = (high << low_bits) | low
        walk = values >= size
        result[outside[~walk]] = values[~walk]
        outside, values = outside[walk], values[walk]
        if len(epoch) > 1:
            keys = [key[walk] for key in keys]
    return result


def _rank_of(within: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The rank of hash number `within` among its chunk's `size` keyed hashes, ties by number: [n] -> [n]."""
    hashes = stream64(key[:, None], np.arange(size, dtype=np.uint64))
    own = np.take_along_axis(hashes, within[:, None], axis=1)
    ties = (hashes == own) & (np.arange(size) < within[:, None])
    return ((hashes < own) | ties).sum(axis=1)
