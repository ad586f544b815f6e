"""Staging on the sending side: copies of segments on their way out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from core.ticket import AttemptKey
from kv_transfer.frame import MAX_SEGMENTS, Entry


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A segment and a copy of its bytes: [N] uint8, owned by the channel until it has left or is dropped."""

    entry: Entry
    payload: Tensor

    @property
    def num_bytes(self) -> int:
        return self.entry.record.num_bytes


class Outbox:
    """A bounded queue of segments, taken in batches. Thread-safe; every method may be called from any thread.

    Segments leave in the order they came. Batches need no timer: what has gathered while the batch before was being
    sent goes together, up to `coalesce_bytes`; on a channel that keeps up each segment leaves at once.
    """

    def __init__(self, max_bytes: int, coalesce_bytes: int) -> None:
        self._max_bytes, self._coalesce_bytes = max_bytes, coalesce_bytes
        self._changed = threading.Condition()
        self._queue: deque[Outgoing] = deque()
        self._num_bytes = 0  # queued and being sent
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Staging in use: what is queued and what is being sent."""
        return self._num_bytes

    def put(self, outgoing: Outgoing, timeout_s: float, wanted: Callable[[], bool]) -> bool:
        """Queue a segment; waits for room, which an empty outbox always has.

        False, and not queued, where the outbox was closed or time ran out, or it is no longer `wanted`.
        """
        with self._changed:

            def has_room() -> bool:
                return not self._num_bytes or self._num_bytes + outgoing.num_bytes <= self._max_bytes

            self._changed.wait_for(lambda: self._closed or has_room() or not wanted(), timeout_s)
            if self._closed or not has_room() or not wanted():
                return False
            self._queue.append(outgoing)
            self._num_bytes += outgoing.num_bytes
            self._changed.notify_all()
        return True

    def take(self, timeout_s: float) -> list[Outgoing] | None:
        """The next batch; empty where nothing came in `timeout_s`; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, timeout_s)
            if self._closed:
                return None
            batch: list[Outgoing] = []
            num_bytes = 0
            while self._queue and len(batch) < MAX_SEGMENTS:
                num_bytes += self._queue[0].num_bytes
                if batch and num_bytes > self._coalesce_bytes:
                    break
                batch.append(self._queue.popleft())
            return batch

    def sent(self, batch: list[Outgoing]) -> None:
        """Free the staging of a batch that was taken."""
        with self._changed:
            self._num_bytes -= sum(outgoing.num_bytes for outgoing in batch)
            self._changed.notify_all()

    def drop(self, key: AttemptKey) -> None:
        """Forget what is queued of an attempt, and let a `put` that waits look again at what is wanted."""
        with self._changed:
            kept = deque(outgoing for outgoing in self._queue if outgoing.entry.key != key)
            self._num_bytes -= sum(o.num_bytes for o in self._queue) - sum(o.num_bytes for o in kept)
            self._queue = kept
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
