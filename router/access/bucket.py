"""A token bucket, told the time: how much of something may be used in a minute."""

from __future__ import annotations


class Bucket:
    """Holds up to `per_minute` and fills at that pace; full at first. What is taken may leave it in debt.

    An hour's quiet is worth no more than a full bucket, and a debt is paid off at the same pace.
    """

    def __init__(self, per_minute: float, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._at_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until it holds `amount`, should nobody take anything meanwhile: 0 now, inf never."""
        if amount > self.per_minute:
            return float("inf")
        return max(0.0, (amount - self._fill(now_s)) * 60.0 / self.per_minute)

    def take(self, amount: float, now_s: float) -> None:
        """Whatever it holds."""
        self._level = self._fill(now_s) - amount

    def _fill(self, now_s: float) -> float:
        elapsed_s = max(0.0, now_s - self._at_s)
        self._level = min(self.per_minute, self._level + elapsed_s * self.per_minute / 60.0)
        self._at_s = max(self._at_s, now_s)
        return self._level
