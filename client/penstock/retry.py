"""When a failed attempt is worth another, and how long to wait before it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from penstock.errors import OverloadedError, PenstockError, UnavailableError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with jitter, on top of what the server asks for.

    The n-th retry waits `retry_after_s` (0 where the server named none) plus a random 50 to 100 % of
    `backoff_s * 2**n`, at most `max_backoff_s`. A server that asks for more than `max_retry_after_s` is not waited for.
    """

    max_retries: int = 2
    backoff_s: float = 0.5
    max_backoff_s: float = 8.0
    max_retry_after_s: float = 60.0
    random: Callable[[], float] = random.random
    """Uniform in [0, 1)."""

    def __post_init__(self) -> None:
        if self.max_retries < 0:
            raise ValueError(f"max_retries: got {self.max_retries}, must be >= 0; 0 turns retries off")

    def delay_s(self, error: PenstockError, num_retries: int) -> float | None:
        """Seconds to wait after `error`, the failure of an attempt that `num_retries` retries came before; or None."""
        if num_retries >= self.max_retries or not isinstance(error, OverloadedError | UnavailableError):
            return None
        retry_after_s = (error.retry_after_s if isinstance(error, OverloadedError) else None) or 0.0
        if retry_after_s > self.max_retry_after_s:
            return None
        backoff_s: float = min(self.backoff_s * 2**num_retries, self.max_backoff_s)
        return retry_after_s + backoff_s * (0.5 + self.random() / 2)
