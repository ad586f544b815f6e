"""How many guesses are worth their while."""

from __future__ import annotations

import math

FADE = 0.98
"""Weight of a step against the one after it."""
FIRST_RATE = 0.7
"""Share of guesses that is taken to be right before any was verified."""
RATE_STEP = 0.1
"""Weight of the last guess in a request's rate."""
MAX_RATE = 0.999
PROBE_INTERVAL = 32
"""Steps after which a request that gave up guessing tries again."""
PROBE_TOKENS = 2
MIN_SPREAD = 0.003
"""Variance of the number of rows, as a share of its mean square, from which on a slope means something."""
MAX_SURPRISE = 4.0
"""A step that took this many times what was expected was held up by something else: more than that does not count."""


class StepCost:
    """Seconds of a step by its number of rows: a line through the steps of late, fitted by least squares.

    `of_row` is what one row more takes: 0 before steps of different sizes were seen, and what it was last when they
    have become alike since. `varied` says whether they differ enough now.
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows2 = self._product = 0.0
        self.of_row = 0.0
        self.varied = False

    def observe(self, num_rows: int, seconds: float) -> None:
        if self._weight:
            seconds = min(seconds, MAX_SURPRISE * self.of_step(num_rows))
        self._weight = FADE * self._weight + 1
        self._rows = FADE * self._rows + num_rows
        self._seconds = FADE * self._seconds + seconds
        self._rows2 = FADE * self._rows2 + num_rows**2
        self._product = FADE * self._product + num_rows * seconds
        spread = self._rows2 * self._weight - self._rows**2
        self.varied = spread > MIN_SPREAD * self._rows2 * self._weight
        if self.varied:
            slope = (self._product * self._weight - self._rows * self._seconds) / spread
            self.of_row = min(max(slope, 0.0), self._seconds / self._rows)  # no rows take no less than no time

    def of_step(self, num_rows: int) -> float:
        if not self._weight:
            return 0.0
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        return mean_seconds + self.of_row * (num_rows - mean_rows)


class Pace:
    """Of one request: how often its guesses are right, and so how many of them pay.

    `rate` is what is expected of it at first. If that is too little, it may still prove the contrary at once.
    """

    def __init__(self, rate: float = FIRST_RATE) -> None:
        self.rate = rate
        self._num_idle = PROBE_INTERVAL - 1

    def observe(self, num_guesses: int, num_right: int) -> None:
        """Guesses behind the first wrong one were not put to the test."""
        for right in [1.0] * num_right + [0.0] * (num_guesses > num_right):
            self.rate = min(MAX_RATE, self.rate + RATE_STEP * (right - self.rate))

    def length(self, least_chance: float, limit: int) -> int:
        """Guesses to make: as many as are right with more than `least_chance`, each only if those before it are."""
        if limit <= 0:
            return 0
        if least_chance <= 0:
            return limit
        if self.rate > least_chance:
            self._num_idle = 0
            return min(limit, math.ceil(math.log(least_chance) / math.log(self.rate)) - 1)
        self._num_idle += 1
        if self._num_idle < PROBE_INTERVAL:
            return 0
        self._num_idle = 0
        return min(limit, PROBE_TOKENS)
