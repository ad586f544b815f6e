"""Room in a fixed memory for pieces that come and go."""

from __future__ import annotations

from bisect import bisect


class Room:
    """Hands out ranges of [0, num_bytes), no two of them overlapping. Not thread-safe.

    The lowest free place is taken: while little is in use it is always the same memory, which stays in the caches. As
    pieces come and go in about the same order, there are few gaps between them to look through.
    """

    def __init__(self, num_bytes: int) -> None:
        self._gaps = [(0, num_bytes)] if num_bytes else []  # `(start, end)`, in order, none touching the next
        self._pieces: dict[int, int] = {}  # start to end
        self.num_bytes = 0
        """In use: taken and not freed."""

    def take(self, num_bytes: int) -> int | None:
        """Offset of a piece of `num_bytes` > 0, or None while there is no room for it."""
        for i, (start, end) in enumerate(self._gaps):
            if end - start >= num_bytes:
                self._gaps[i : i + 1] = [(start + num_bytes, end)] if end - start > num_bytes else []
                self._pieces[start] = start + num_bytes
                self.num_bytes += num_bytes
                return start
        return None

    def free(self, offset: int) -> None:
        """The piece at `offset` is not used any more. KeyError where there is none."""
        start, end = offset, self._pieces.pop(offset)
        self.num_bytes -= end - start
        first = last = bisect(self._gaps, (start, end))
        if first and self._gaps[first - 1][1] == start:
            first -= 1
            start = self._gaps[first][0]
        if last < len(self._gaps) and self._gaps[last][0] == end:
            end = self._gaps[last][1]
            last += 1
        self._gaps[first:last] = [(start, end)]
