"""Prompt lookup: what followed the last time that the request said the same."""

from __future__ import annotations

from collections.abc import Sequence

from core.request import Request

MAX_CANDIDATES = 8
"""Earlier places that are compared, the latest first."""


class NgramProposer:
    """Finds the place in a request's own tokens that ends most like the end, and guesses that it goes on alike.

    Of places equally alike the latest counts. A place must share `min_tokens`; beyond `max_tokens` likeness does not
    count (Saxena, "Prompt lookup decoding", 2023).
    """

    seconds_per_token = 0.0

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        self._min_tokens, self._max_tokens = min_tokens, max_tokens
        self._histories: dict[Request, _History] = {}

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        return [self._guess(request, num_tokens) for request, num_tokens in wanted]

    def learn(self, request: Request, token_ids: Sequence[int], drawn: Sequence[int]) -> None:
        """All it needs is in the requests."""

    def forget(self, request: Request) -> None:
        self._histories.pop(request, None)

    def _guess(self, request: Request, num_tokens: int) -> list[int]:
        if (history := self._histories.get(request)) is None:
            history = self._histories[request] = _History(self._min_tokens)
        history.extend(request.token_ids(len(history.tokens), request.num_tokens))
        place = history.place(self._max_tokens)
        return history.copy(place, num_tokens) if place is not None else []


class _History:
    """A request's tokens, and for each the place before where the last `size` tokens were the same: O(1) a token."""

    def __init__(self, size: int) -> None:
        self.tokens: list[int] = []
        self._size = size
        self._latest: dict[tuple[int, ...], int] = {}
        self._before: list[int | None] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self.tokens.append(token_id)
            key = tuple(self.tokens[-self._size :])
            self._before.append(self._latest.get(key))
            if len(key) == self._size:
                self._latest[key] = len(self.tokens) - 1

    def place(self, max_tokens: int) -> int | None:
        """Index of the earlier token that, with those before it, is most like the last one."""
        best, best_alike = None, 0
        candidate = self._before[-1]
        for _ in range(MAX_CANDIDATES):
            if candidate is None or best_alike == max_tokens:
                break
            if (alike := self._num_alike(candidate, max_tokens)) > best_alike:
                best, best_alike = candidate, alike
            candidate = self._before[candidate]
        return best

    def copy(self, place: int, num_tokens: int) -> list[int]:
        """What follows `place`; where that comes to the end, it goes on with what it has copied."""
        copied: list[int] = []
        for i in range(place + 1, place + 1 + num_tokens):
            copied.append(self.tokens[i] if i < len(self.tokens) else copied[i - len(self.tokens)])
        return copied

    def _num_alike(self, place: int, max_tokens: int) -> int:
        tokens, last = self.tokens, len(self.tokens) - 1
        num_alike = self._size
        while num_alike < max_tokens and num_alike <= place and tokens[place - num_alike] == tokens[last - num_alike]:
            num_alike += 1
        return num_alike
