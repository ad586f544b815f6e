"""Sampling parameters, validated and resolved: nothing is left to default once one of these exists."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.errors import InvalidRequestError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn and when it ends.

    `temperature` 0 is greedy. `top_k` 0 means no limit. `max_tokens` and `min_tokens` count output tokens.
    `stop_token_ids` are the tokens that end the request, end-of-sequence included. Stop *strings* are the router's.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidRequestError("temperature", self.temperature, "must be a finite number >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError("top_p", self.top_p, "must be in (0, 1]; 1 turns it off")
        if self.top_k < 0:
            raise InvalidRequestError("top_k", self.top_k, "must be >= 1, or 0 or -1 for no limit")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequestError("seed", self.seed, "must be in [0, 2**64)")
        if self.max_tokens < 1:
            raise InvalidRequestError("max_tokens", self.max_tokens, "must be >= 1")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidRequestError("min_tokens", self.min_tokens, f"must be in [0, max_tokens = {self.max_tokens}]")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
