"""Sampling parameters, validated and resolved: nothing is left to default once one of these exists."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.errors import InvalidRequestError

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_REPETITION_PENALTY = 10.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn and when it ends.

    `temperature` 0 is greedy. `top_k` 0 means no limit. `max_tokens` and `min_tokens` count output tokens.
    `stop_token_ids` are the tokens that end the request, end-of-sequence included. Stop *strings* are the router's.

    `repetition_penalty` divides positive logits of tokens that were there before, prompt included, and multiplies
    negative ones. `frequency_penalty` and `presence_penalty` are taken from logits of output tokens: once for every
    time, and once. `min_p` drops tokens less likely than this share of the likeliest. `logit_bias` holds (token id,
    addend) pairs. `bad_words` are token sequences whose last token can't follow the others. With `allowed_token_ids`
    nothing else can be drawn. `grammar` is in llguidance's format, as `text/grammar.py` writes it.

    `logprobs` and `prompt_logprobs` are how many of the best tokens to tell besides the drawn one, or the prompt's.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    grammar: str = ""
    logprobs: int | None = None
    prompt_logprobs: int | None = None

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
        self._check_penalties()
        self._check_token_rules()

    def _check_penalties(self) -> None:
        if not 0 <= self.min_p <= 1:
            raise InvalidRequestError("min_p", self.min_p, "must be in [0, 1]; 0 turns it off")
        if not 0 < self.repetition_penalty <= MAX_REPETITION_PENALTY:
            fix = f"must be in (0, {MAX_REPETITION_PENALTY}]; 1 turns it off"
            raise InvalidRequestError("repetition_penalty", self.repetition_penalty, fix)
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InvalidRequestError(name, getattr(self, name), "must be in [-2, 2]; 0 turns it off")

    def _check_token_rules(self) -> None:
        for _, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise InvalidRequestError("logit_bias", bias, "must be in [-100, 100]")
        if not all(self.bad_words):
            raise InvalidRequestError("bad_words", self.bad_words, "must hold at least one token each")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise InvalidRequestError(name, value, f"must be in [0, {MAX_LOGPROBS}], or left out")
        if self.grammar and self.min_tokens:
            raise InvalidRequestError(
                "min_tokens", self.min_tokens, "must be 0 with structured output, which ends itself"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    @property
    def looks_back(self) -> bool:
        """Whether what may be drawn depends on tokens before."""
        return bool(self.penalizes or self.bad_words or self.grammar)
