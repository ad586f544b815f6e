"""The numbers of pairs' channels."""

from __future__ import annotations

import time
from collections.abc import Callable

from core.ticket import LANE_SHIFT


def wall_clock_epochs(wall_clock: Callable[[], float] = time.time, lane: int = 0) -> Callable[[], int]:
    """Epochs that go on rising when the router restarts: seconds since 1970, or one more than the last. Each router of
    a cluster has a `lane` of its own, so that none replaces the channels of another."""
    last = 0

    def next_epoch() -> int:
        nonlocal last
        last = max(last + 1, int(wall_clock()))
        return (lane << LANE_SHIFT) | last

    return next_epoch
