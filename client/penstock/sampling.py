"""The options of a generation, by name and type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from penstock.errors import InvalidRequestError

STRUCTURES = ("json_schema", "json_object", "regex", "choice", "grammar")


class Sampling(TypedDict, total=False):
    """How tokens are drawn, and when the text ends. What is None or left out, the model's own defaults decide.

    Penalties make tokens less likely that were there before: `repetition_penalty` those of prompt and output, the two
    others those of the output. `logprobs` and `prompt_logprobs` are how many of the best tokens to tell, besides the
    token itself. At most one of the last five says what the text must be; `grammar` is Lark, or GBNF.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: Iterable[str] | None
    allowed_token_ids: Iterable[int] | None
    min_tokens: int | None
    stop: str | Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    json_schema: str | Mapping[str, Any] | None
    json_object: bool | None
    regex: str | None
    choice: Iterable[str] | None
    grammar: str | None


def checked(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """By the wire's names. `TypeError` for a name that is none of them, `InvalidRequestError` for two structures."""
    for name in sampling:
        if name not in Sampling.__annotations__:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
    asked = [name for name in STRUCTURES if sampling.get(name) is not None]
    if len(asked) > 1:
        raise InvalidRequestError(f"{asked[1]}: must be left out where {asked[0]} is given", asked[1])
    stop = sampling.get("stop")
    return {**sampling, "stop": [stop] if isinstance(stop, str) else stop}
