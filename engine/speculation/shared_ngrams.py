"""What followed the last time that anybody said the same."""

from __future__ import annotations

from collections.abc import Sequence

from core.request import Request
from engine.speculation.fading_map import FadingMap

MAX_ENTRIES = 1 << 18
"""Runs, each with its next token; twice as many may be kept."""


class SharedNgramProposer:
    """Guesses from the tokens of all requests, those that are gone included, as far as they have the same cache salt.

    For every run of `min_tokens` to `max_tokens` tokens it remembers what came after it last; the longest run that it
    knows counts. This is the trie of Lookahead (Zhao et al. 2023) with each path a key of its own: so what was not met
    for long is easily forgotten.
    """

    seconds_per_token = 0.0

    def __init__(self, min_tokens: int, max_tokens: int, max_entries: int = MAX_ENTRIES) -> None:
        self._sizes = range(max_tokens, min_tokens - 1, -1)
        self._next: FadingMap[tuple[str, tuple[int, ...]], int] = FadingMap(max_entries)
        self._num_seen: dict[Request, int] = {}

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        for request, _ in wanted:
            self._read(request)
        return [self._guess(request, num_tokens) for request, num_tokens in wanted]

    def learn(self, request: Request, token_ids: Sequence[int], drawn: Sequence[int]) -> None:
        """All it needs is in the requests."""

    def forget(self, request: Request) -> None:
        """Its tokens stay, for others."""
        if request in self._num_seen:
            self._read(request)
            del self._num_seen[request]

    def _guess(self, request: Request, num_tokens: int) -> list[int]:
        salt, longest = request.cache_salt, self._sizes[0]
        tokens = request.token_ids(max(0, request.num_tokens - longest), request.num_tokens)
        num_known = len(tokens)
        while len(tokens) < num_known + num_tokens:
            runs = (tuple(tokens[-size:]) for size in self._sizes if size <= len(tokens))
            token_id = next((found for run in runs if (found := self._next.get((salt, run))) is not None), None)
            if token_id is None:
                break
            tokens.append(token_id)
        return tokens[num_known:]

    def _read(self, request: Request) -> None:
        """Learn from what of the request was not seen yet."""
        salt, longest = request.cache_salt, self._sizes[0]
        seen, known = self._num_seen.get(request, 0), request.num_tokens
        first = max(0, seen - longest)
        tokens = request.token_ids(first, known)
        for i in range(seen - first, known - first):
            for size in self._sizes:
                if size <= i:
                    self._next.put((salt, tuple(tokens[i - size : i])), tokens[i])
        self._num_seen[request] = known
