"""Time is an argument: constructors that need a clock receive one."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds on a monotonic clock; `time.monotonic` where a process is composed."""


class ManualClock:
    """A clock that tests turn by hand."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
