"""Stop strings over a stream of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopOutput:
    """Text that may be shown, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Ends a text before the first stop string, wherever the deltas are cut.

    First is the one completed first; of two that are completed by the same character, the longer. Text that may be
    the start of a stop string is held back until it is known. Knuth, Morris and Pratt's automaton, one per string:
    the work per character is constant, amortised.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # per stop: its longest prefix that the text now ends with
        self._held = ""

    def push(self, text: str) -> StopOutput:
        """What `text` lets out. After a match there is nothing more to push."""
        if not self._stops:
            return StopOutput(text)
        for position, character in enumerate(text):
            stop = self._step(character)
            if stop is not None:
                seen = self._held + text[: position + 1]
                self._held = ""
                return StopOutput(seen[: len(seen) - len(stop)], stop)
        seen = self._held + text
        cut = len(seen) - max(self._matched)
        self._held = seen[cut:]
        return StopOutput(seen[:cut])

    def flush(self) -> str:
        """What was held back, once the text is known to end here."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Move every automaton; the stop string that is now complete, if one is."""
        complete = None
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            length = self._matched[i]
            while length and stop[length] != character:
                length = borders[length - 1]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                complete = complete or stop
                length = 0
            self._matched[i] = length
        return complete


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        borders[i] = length
    return borders
