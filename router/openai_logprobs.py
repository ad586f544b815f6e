"""Log-probabilities as the OpenAI API writes them, and vLLM those of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from core.logprobs import TokenLogprobs

Json = dict[str, Any]
TokenBytes = Callable[[int], bytes]
"""The UTF-8 of a token, or part of a character's."""


def chat_logprobs(told: Sequence[TokenLogprobs], token_bytes: TokenBytes) -> Json:
    def each(token_id: int, logprob: float) -> Json:
        piece = token_bytes(token_id)
        return {"token": piece.decode(errors="replace"), "logprob": logprob, "bytes": list(piece)}

    content = [each(t.token_id, t.logprob) | {"top_logprobs": [each(*best) for best in t.top]} for t in told]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Sequence[TokenLogprobs], token_bytes: TokenBytes, first_offset: int) -> Json:
    """The drawn token is among `top_logprobs`, best or not. `first_offset`: characters of the tokens before."""
    tokens = [token_bytes(t.token_id).decode(errors="replace") for t in told]
    offsets, offset = [], first_offset
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    best = [{token_bytes(i).decode(errors="replace"): p for i, p in (*t.top, (t.token_id, t.logprob))} for t in told]
    return {
        "tokens": tokens,
        "token_logprobs": [t.logprob for t in told],
        "top_logprobs": best,
        "text_offset": offsets,
    }


def prompt_logprobs(told: Sequence[TokenLogprobs], token_bytes: TokenBytes) -> list[Json | None]:
    """By token id, the prompt's own first; nothing is known of the first token."""

    def each(token_id: int, logprob: float, rank: int) -> Json:
        return {"logprob": logprob, "rank": rank, "decoded_token": token_bytes(token_id).decode(errors="replace")}

    def place(t: TokenLogprobs) -> Json:
        best = {str(i): each(i, p, rank) for rank, (i, p) in enumerate(t.top, start=1)}
        return {str(t.token_id): each(t.token_id, t.logprob, t.rank)} | best

    return [None, *map(place, told)]
