"""Room in a fixed memory for pieces that come and go in about the same order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class _Piece:
    start: int
    end: int
    freed: bool = False


class Ring:
    """Hands out ranges of [0, num_bytes), no two of them overlapping. Not thread-safe.

    Pieces follow each other without gaps, but where the end is reached; an empty ring begins at 0 again, where the
    memory is still in the caches. A piece freed out of turn is free once all before it, or all after it, are.
    """

    def __init__(self, num_bytes: int) -> None:
        self._size = num_bytes
        self._pieces: deque[_Piece] = deque()
        self.num_bytes = 0
        """In use: taken and not freed."""

    def take(self, num_bytes: int) -> int | None:
        """Offset of a piece of `num_bytes` > 0, or None while there is no room for it."""
        start = self._room(num_bytes)
        if start is not None:
            self._pieces.append(_Piece(start, start + num_bytes))
            self.num_bytes += num_bytes
        return start

    def free(self, offset: int) -> None:
        """The piece at `offset` is not used any more. KeyError where there is none."""
        piece = next((piece for piece in self._pieces if piece.start == offset and not piece.freed), None)
        if piece is None:
            raise KeyError(offset)
        piece.freed = True
        self.num_bytes -= piece.end - piece.start
        while self._pieces and self._pieces[0].freed:
            self._pieces.popleft()
        while self._pieces and self._pieces[-1].freed:
            self._pieces.pop()

    def _room(self, num_bytes: int) -> int | None:
        if not self._pieces:
            return 0 if num_bytes <= self._size else None
        first, end = self._pieces[0].start, self._pieces[-1].end
        if end <= first:  # the newest pieces stand before the oldest
            return end if num_bytes <= first - end else None
        if num_bytes <= self._size - end:
            return end
        return 0 if num_bytes <= first else None
