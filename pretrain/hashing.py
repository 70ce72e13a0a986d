"""Keyed integer hashing: the only source of randomness in the stream.

splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014) and its finaliser:
integer arithmetic modulo 2^64 and nothing else, so that no version of numpy changes an order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: splitmix64's step
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1

# The purpose of a hash, the first word of its key, so that no two purposes share a stream.
CHUNKS, WITHIN_CHUNK, AUGMENT, SHARDS, MIXUP, HELD_OUT, CUTMIX, PAIRS = 1, 2, 3, 4, 5, 6, 7, 8


def mix64(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, a bijection of 64-bit words: uint64 array -> uint64 array of the same shape."""
    mixed = words ^ (words >> np.uint64(30))
    mixed *= np.uint64(_FIRST)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_SECOND)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def stream64(state: NDArray[np.uint64], numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output `numbers` (from 0) of splitmix64 started at `state`; the two broadcast."""
    return mix64(state + (numbers + np.uint64(1)) * np.uint64(_GOLDEN))


def hash_words(*words: ArrayLike) -> NDArray[np.uint64]:
    """One 64-bit hash of a tuple of integers in [0, 2^64); arrays broadcast. uint64, at least one axis."""
    state = np.zeros(1, np.uint64)
    step = np.uint64(_GOLDEN)
    for word in words:
        # At least one axis: numpy warns where a scalar overflows, which is intended here.
        state = mix64(state + step + mix64(np.atleast_1d(np.asarray(word, np.uint64)) + step))
    return state


def _mix(word: int) -> int:
    """`mix64` of one Python integer."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * _FIRST) & _WORD
    word = ((word ^ (word >> 27)) * _SECOND) & _WORD
    return word ^ (word >> 31)


def _add(state: int, word: int) -> int:
    """`state` with one more word hashed in, as in `hash_words`."""
    return _mix(state + _GOLDEN + _mix(word + _GOLDEN))


@lru_cache(maxsize=8)  # the samples of a batch share it
def _epoch_state(seed: int, epoch: int) -> int:
    return _add(_add(_add(0, AUGMENT), seed), epoch)


class Draws:
    """A short stream of random numbers for one sample of one epoch, the same on any rank and in any thread.

    Plain Python integers: for the few draws of a crop, numpy's cost per call is ten times as high.
    """

    def __init__(self, seed: int, epoch: int, sample_id: int) -> None:
        self._state = _add(_epoch_state(seed, epoch), sample_id)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high), 53 random bits."""
        return low + (high - low) * ((self._next() >> 11) * 2.0**-53)

    def below(self, count: int) -> int:
        """An integer in [0, count), for 0 < count < 2^32."""
        return ((self._next() >> 32) * count) >> 32

    def _next(self) -> int:
        self._state += _GOLDEN
        return _mix(self._state)
