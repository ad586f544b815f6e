"""How much of a prompt's KV leaves at once. Pure: durations come in as arguments.

What leaves while the prompt is still being computed is hidden behind computing, but each batch costs something however
small it is, the engine's thread included. Splitting N bytes into k batches leaves N / k of them to be carried after the
last layer and costs k times that price, so it is least where k is the root of N over what the link carries at the
price of one batch. A prompt smaller than that leaves in one piece at its end: overlapping would cost more than it hides
(Splitwise, 2024, chooses so by the size of the prompt, too).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Literal

Streaming = Literal["auto", "layerwise", "serial"]

MAX_SAMPLES = 16
"""Of one size class; older ones are forgotten."""
FIT_EVERY = 8
"""Samples, but the first of a class."""
MIN_LATENCY_S, MAX_LATENCY_S = 1e-6, 1.0
MIN_BYTES_PER_S, MAX_BYTES_PER_S = 1e6, 1e12


@dataclass(frozen=True, slots=True)
class LinkFit:
    """A batch of N bytes takes `latency_s + N / bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    @property
    def crossover_bytes(self) -> float:
        """What the link carries in the time that a batch costs whatever its size."""
        return self.latency_s * self.bytes_per_s


UNMEASURED = LinkFit(2e-4, 4e9)
"""Where a link has not been measured yet: about what shared memory and gloo do on one host."""


class LinkMeter:
    """Finds a link's latency and bandwidth from what its batches took, while it is used. Not thread-safe.

    Sizes are sorted into classes by powers of two. A class is as fast as the lower quartile of its latest samples,
    since noise only ever adds; the slope is the median of those between any two classes (Theil, 1950; Sen, 1968), so a
    class that is off does not bend it. With one class alone only what that class says changes.
    """

    def __init__(self) -> None:
        self._classes: dict[int, deque[tuple[int, float]]] = {}
        self._num_new = 0
        self.fit = UNMEASURED

    def observe(self, num_bytes: int, seconds: float) -> None:
        """A batch of `num_bytes` >= 0 has taken so long; what is not a duration is ignored."""
        if num_bytes < 0 or not (0 < seconds < math.inf):
            return
        samples = self._classes.setdefault(num_bytes.bit_length(), deque(maxlen=MAX_SAMPLES))
        samples.append((num_bytes, seconds))
        self._num_new += 1
        if len(samples) > 1 and self._num_new < FIT_EVERY:
            return
        self._num_new = 0
        self.fit = _fitted([_typical(samples) for samples in self._classes.values()], self.fit)


def batch_bytes(total_bytes: int, fit: LinkFit, streaming: Streaming = "auto") -> int:
    """How many bytes gather before a batch leaves, where `total_bytes` are to leave in all; at least 1.

    Whatever it says, what is left leaves with the last layer.
    """
    if streaming == "layerwise":
        return 1
    if streaming == "serial":
        return max(1, total_bytes)
    return max(1, math.ceil(math.sqrt(total_bytes * fit.crossover_bytes)))


def _typical(samples: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """Bytes and seconds: the lower quartile of the time, and the median size."""
    sizes, times = zip(*samples, strict=True)
    return median(sizes), sorted(times)[len(times) // 4]


def _fitted(points: list[tuple[float, float]], before: LinkFit) -> LinkFit:
    slopes = [(t - s) / (b - a) for (a, s), (b, t) in combinations(sorted(points), 2) if b > a]
    rising = [slope for slope in slopes if slope > 0]
    bytes_per_s = before.bytes_per_s
    if rising:
        bytes_per_s = min(max(1 / median(rising), MIN_BYTES_PER_S), MAX_BYTES_PER_S)
    num_bytes, seconds = min(points)  # the other sizes say less of what is the same for all
    latency_s = min(max(seconds - num_bytes / bytes_per_s, MIN_LATENCY_S), MAX_LATENCY_S)
    return LinkFit(latency_s, bytes_per_s)
