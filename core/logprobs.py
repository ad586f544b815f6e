"""Log-probabilities of tokens, as the model gave them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token and the best ones in its place, by the model's own distribution: before any sampling parameter.

    `rank` of the token is 1 for the best. `top` are the best tokens and their log-probabilities, best first, as many as
    were asked for. Of equal ones the lower token id is the better.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()
