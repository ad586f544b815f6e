"""Philox4x32-10, a random generator without state (Salmon, Moraes, Dror & Shaw, SC'11): words from (key, counter)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64).reshape(10, 1, 1)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counters: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """N blocks of four random words. counters: [4, N]; keys: [2, N]; returns [4, N]; all 32-bit words in uint64."""
    evens, odds = counters[0::2], counters[1::2]
    for round_keys in (keys + _ROUNDS * _KEY_STEPS) & _LOW:
        products = evens * _MULTIPLIERS
        evens = (products >> _HALF)[::-1] ^ odds ^ round_keys
        odds = (products & _LOW)[::-1]
    return np.stack((evens[0], odds[0], evens[1], odds[1]))


def uniforms(seeds: Sequence[int], positions: Sequence[int], draw: int = 0) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position), 53 bits each. The same arguments give the same numbers anywhere.

    seeds: N integers in [0, 2^64), the keys; positions: N integers in [0, 2^64), the low half of the counters; draw:
    tells numbers for the same position apart.
    """
    seed, position = np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.uint64)
    zeros = np.zeros_like(position)
    counters = np.stack((position & _LOW, position >> _HALF, zeros + np.uint64(draw), zeros))
    words = philox4x32(counters, np.stack((seed & _LOW, seed >> _HALF)))
    bits = (words[0] >> np.uint64(5) << np.uint64(26)) | (words[1] >> np.uint64(6))
    numbers: npt.NDArray[np.float64] = np.ldexp(bits.astype(np.float64), -53)
    return numbers
