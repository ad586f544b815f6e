"""The queue in front of the workers, and what to tell those who find it full."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator

from router.ledger import Entry


class WaitingQueue:
    """Entries in order of arrival. One that comes back after a failure or refusal takes its old place: the head."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Over a copy: entries may be removed meanwhile."""
        return iter(tuple(self._entries))

    def push(self, entry: Entry) -> None:
        bisect.insort(self._entries, entry, key=lambda e: e.seq)

    def remove(self, entry: Entry) -> bool:
        """False where it is not in the queue."""
        index = bisect.bisect_left(self._entries, entry.seq, key=lambda e: e.seq)
        found = index < len(self._entries) and self._entries[index] is entry
        if found:
            del self._entries[index]
        return found


class RetryAdvice:
    """When to come back to a full queue: at the rate at which requests have ended lately, behind those told before.

    Everyone who is turned away is given the next place in an imagined line, which moves by one with each end.
    """

    def __init__(self, *, window: int = 256, unknown_s: float = 5.0, min_s: float = 0.1, max_s: float = 60.0) -> None:
        self._ends_s: deque[float] = deque(maxlen=window)  # of the last `max_s` seconds
        self._unknown_s, self._min_s, self._max_s = unknown_s, min_s, max_s
        self._line = 0

    def on_end(self, now_s: float) -> None:
        self._ends_s.append(now_s)
        self._line = max(0, self._line - 1)

    def retry_after_s(self, now_s: float) -> float:
        """For one more who is turned away now."""
        self._line += 1
        while self._ends_s and self._ends_s[0] < now_s - self._max_s:
            self._ends_s.popleft()
        if not self._ends_s:
            return self._unknown_s
        seconds_per_end = (now_s - self._ends_s[0]) / len(self._ends_s)
        return min(self._max_s, max(self._min_s, self._line * seconds_per_end))
