"""Token recycling: what the model last thought of as the next token."""

from __future__ import annotations

from collections.abc import Sequence

from core.request import Request
from engine.speculation.fading_map import FadingMap

MAX_ENTRIES = 1 << 17


class RecyclingProposer:
    """Guesses that after a token comes what was drawn after it last, be it in vain: then the same again.

    Draws that stood behind a wrong guess are no output, but still tell what the model makes of a token (Luo et al.,
    "Turning trash into treasure", 2024). They keep the best few successors of each token, for trees of guesses; a chain
    asks only for one, so one is kept, and no logits are sorted. Shared by requests of one cache salt.
    """

    seconds_per_token = 0.0

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._successors: FadingMap[tuple[str, int], int] = FadingMap(max_entries)

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        return [self._guess(request, num_tokens) for request, num_tokens in wanted]

    def learn(self, request: Request, token_ids: Sequence[int], drawn: Sequence[int]) -> None:
        for token_id, successor in zip(token_ids, drawn, strict=False):
            self._successors.put((request.cache_salt, token_id), successor)

    def forget(self, request: Request) -> None:
        """Nothing is kept of a single request."""

    def _guess(self, request: Request, num_tokens: int) -> list[int]:
        tokens, salt = [request.last_token_id], request.cache_salt
        while len(tokens) <= num_tokens and (token_id := self._successors.get((salt, tokens[-1]))) is not None:
            tokens.append(token_id)
        return tokens[1:]
