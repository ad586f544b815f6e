"""Staging on the sending side: copies of segments on their way out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from core.ticket import AttemptKey
from kv_transfer.frame import MAX_SEGMENTS, Entry
from kv_transfer.room import Room


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A segment and a copy of its bytes: [N] uint8, owned by the channel until it has left or is dropped."""

    entry: Entry
    payload: Tensor
    staged: bool = False
    """Whether the payload is a piece of the outbox's own memory, that `stage` gave."""

    @property
    def num_bytes(self) -> int:
        return self.entry.record.num_bytes


class Outbox:
    """A bounded queue of segments, taken in batches. Thread-safe; every method may be called from any thread.

    Segments leave in the order they came. Batches need no timer: what has gathered while the batch before was being
    sent goes together, up to `coalesce_bytes`; on a channel that keeps up each segment leaves at once. Payload lies
    in `memory`, [N] uint8, where it is staged there, else wherever it was made; each may take `max_bytes`.
    """

    def __init__(self, max_bytes: int, coalesce_bytes: int, memory: Tensor | None = None) -> None:
        self._max_bytes, self._coalesce_bytes, self._memory = max_bytes, coalesce_bytes, memory
        self._room = Room(0 if memory is None else memory.numel())
        self._changed = threading.Condition()
        self._queue: deque[Outgoing] = deque()
        self._num_bytes = 0  # queued and being sent, outside of the room
        self._num_left = 0
        self._stuck = False  # somebody has waited in vain, and nothing has left since
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Staging in use: what is being made, queued and sent."""
        return self._num_bytes + self._room.num_bytes

    def stage(self, num_bytes: int, patience_s: float, wanted: Callable[[], bool]) -> Tensor | None:
        """Room for a payload to be made in, which ends with `put` or `unstage`.

        Waits for it while batches leave; None where the outbox was closed, none has left for `patience_s`, or it is no
        longer `wanted`. Who comes after one who waited in vain does not wait: that peer holds nobody up twice.
        """
        with self._changed:
            place: int | None = None

            def found() -> bool:
                nonlocal place
                if place is None and not self._closed and wanted():
                    place = self._room.take(num_bytes)
                return self._closed or not wanted() or place is not None

            self._wait(found, patience_s)
            if place is None or self._memory is None:
                return None
            return self._memory[place : place + num_bytes]

    def unstage(self, payload: Tensor) -> None:
        """What `stage` gave is not needed."""
        with self._changed:
            self._free_staged(payload)
            self._changed.notify_all()

    def put(self, outgoing: Outgoing, patience_s: float, wanted: Callable[[], bool], *, more: bool = False) -> bool:
        """Queue a segment; where it is not staged, waits for room as `stage` does. An empty outbox always has room.

        False, and not queued, where there was none, the outbox was closed, or it is no longer `wanted`. With `more` to
        come at once nobody is woken for this one, so that they leave together.
        """
        with self._changed:

            def has_room() -> bool:
                if outgoing.staged or not self._num_bytes:
                    return True
                return self._num_bytes + outgoing.num_bytes <= self._max_bytes

            self._wait(lambda: self._closed or has_room() or not wanted(), patience_s)
            if self._closed or not has_room() or not wanted():
                if outgoing.staged:
                    self._free_staged(outgoing.payload)
                return False
            self._queue.append(outgoing)
            if not outgoing.staged:
                self._num_bytes += outgoing.num_bytes
            if not more:
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
            self._num_left, self._stuck = self._num_left + 1, False
            self._free(batch)

    def drop(self, key: AttemptKey) -> None:
        """Forget what is queued of an attempt, and let whoever waits look again at what is wanted."""
        with self._changed:
            dropped = [outgoing for outgoing in self._queue if outgoing.entry.key == key]
            self._queue = deque(outgoing for outgoing in self._queue if outgoing.entry.key != key)
            self._free(dropped)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    # ---- under the lock

    def _wait(self, done: Callable[[], bool], patience_s: float) -> None:
        while not done() and not self._stuck:
            self._changed.notify_all()  # of what was put with more to come, which may be what is waited for
            num_left = self._num_left

            def moved(num_left: int = num_left) -> bool:
                return done() or self._num_left != num_left

            self._stuck = not self._changed.wait_for(moved, patience_s)

    def _free(self, batch: list[Outgoing]) -> None:
        for outgoing in batch:
            if outgoing.staged:
                self._free_staged(outgoing.payload)
            else:
                self._num_bytes -= outgoing.num_bytes
        self._changed.notify_all()

    def _free_staged(self, payload: Tensor) -> None:
        assert self._memory is not None
        self._room.free(payload.data_ptr() - self._memory.data_ptr())
