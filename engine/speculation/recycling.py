"""Token recycling: what the model last thought of as the next token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from core.request import Request

MAX_SALTS = 64


class RecyclingProposer:
    """Guesses that after a token comes what was drawn after it last, be it in vain: then the same again.

    Draws that stood behind a wrong guess are no output, but still tell what the model makes of a token (Luo et al.,
    "Turning trash into treasure", 2024). They keep the best few successors of each token, for trees of guesses; a chain
    asks only for one, so one is kept, and no logits are sorted. Shared by requests of one cache salt.
    """

    seconds_per_token = 0.0

    def __init__(self) -> None:
        self._successors: OrderedDict[str, dict[int, int]] = OrderedDict()

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        return [self._guess(request, num_tokens) for request, num_tokens in wanted]

    def learn(self, request: Request, token_ids: Sequence[int], drawn: Sequence[int]) -> None:
        self._of(request).update(zip(token_ids, drawn, strict=False))

    def forget(self, request: Request) -> None:
        """Nothing is kept of a single request."""

    def _guess(self, request: Request, num_tokens: int) -> list[int]:
        successors = self._of(request)
        tokens = request.token_ids(request.num_tokens - 1, request.num_tokens)
        while len(tokens) <= num_tokens and (token_id := successors.get(tokens[-1])) is not None:
            tokens.append(token_id)
        return tokens[1:]

    def _of(self, request: Request) -> dict[int, int]:
        """Of the request's salt; the one that was not used for longest gives way."""
        successors = self._successors.setdefault(request.cache_salt, {})
        self._successors.move_to_end(request.cache_salt)
        while len(self._successors) > MAX_SALTS:
            self._successors.popitem(last=False)
        return successors
