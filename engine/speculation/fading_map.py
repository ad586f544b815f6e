"""A map that forgets."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FadingMap(Generic[K, V]):
    """Keeps at least the last `max_entries` keys that were put, and at most twice as many.

    Two generations: when the young one is full it becomes the old one, and what was in that is forgotten all at once.
    So nothing has to be kept in order.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())

    def get(self, key: K) -> V | None:
        found = self._young.get(key)
        return self._old.get(key) if found is None else found

    def put(self, key: K, value: V) -> None:
        if len(self._young) >= self._max_entries and key not in self._young:
            self._young, self._old = {}, self._young
        self._young[key] = value
