"""How long things take, fitted on line to what was measured: robust, and sane before anything was."""

from __future__ import annotations

import math

FORGETTING = 0.98
"""Of what was known at each new reading: the last fifty or so count."""
PRIOR_WEIGHT = 1.0
"""Readings that the prior is worth. Its shape is kept; its size is taken from what was measured."""
CLIP = 4.0
"""A reading farther off than so many usual errors counts as that far off."""
NUM_UNCLIPPED = 4


class Line:
    """y = intercept + slope * x, both never negative: weighted least squares, late readings before early ones.

    Where the readings do not tell intercept from slope (all at one x), the prior's proportion decides. One wild
    reading is clipped; several in a row are believed.
    """

    __slots__ = ("_error", "_prior", "_span", "_sums", "intercept", "num_readings", "slope")

    def __init__(self, intercept: float, slope: float, span: float) -> None:
        """`span`: an x as large as is usual, above zero."""
        self._prior, self._span = (intercept, slope), span
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of weights, x, x^2, y, xy
        self._error = 0.0
        self.num_readings = 0
        self.intercept, self.slope = intercept, slope

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x

    def observe(self, x: float, y: float) -> None:
        """A reading; what is negative or not finite is none."""
        if not (x >= 0.0 and y >= 0.0 and math.isfinite(x) and math.isfinite(y)):
            return
        off = y - self.at(x)
        self.num_readings += 1
        if self.num_readings > NUM_UNCLIPPED:
            limit = CLIP * self._error + 1e-9
            y = self.at(x) + min(limit, max(-limit, off))
        if self.num_readings <= NUM_UNCLIPPED:
            self._error = max(self._error, abs(off))
        else:
            self._error += 0.1 * (min(abs(off), 8 * self._error + 1e-9) - self._error)
        self._sums = tuple(
            FORGETTING * old + new for old, new in zip(self._sums, (1.0, x, x * x, y, x * y), strict=True)
        )  # type: ignore[assignment]
        self._fit()

    def _fit(self) -> None:
        """With two readings more, on the prior scaled to the mean of the others."""
        weight, sum_x, sum_xx, sum_y, sum_xy = self._sums
        intercept, slope = self._prior
        expected = intercept * weight + slope * sum_x
        scale = sum_y / expected if expected > 0 else 1.0
        half = PRIOR_WEIGHT / 2
        for x in (0.0, self._span):
            y = scale * (intercept + slope * x)
            weight, sum_x, sum_xx = weight + half, sum_x + half * x, sum_xx + half * x * x
            sum_y, sum_xy = sum_y + half * y, sum_xy + half * x * y
        spread = weight * sum_xx - sum_x * sum_x
        b = (weight * sum_xy - sum_x * sum_y) / spread
        a = (sum_y - b * sum_x) / weight
        if b < 0.0:
            a, b = sum_y / weight, 0.0
        elif a < 0.0:
            a, b = 0.0, sum_xy / sum_xx
        self.intercept, self.slope = max(0.0, a), max(0.0, b)


class Average:
    """Of late readings more than of early ones; `value` is the prior's until there are some."""

    __slots__ = ("num_readings", "value")

    def __init__(self, prior: float) -> None:
        self.value, self.num_readings = prior, 0

    def observe(self, reading: float) -> None:
        self.num_readings += 1
        share = max(1 / self.num_readings, 1 - FORGETTING)
        self.value += share * (reading - self.value)
