"""Bodies of the OpenAI API: what we heed, what we may ignore, and what we must refuse by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator, ValidationError

from core.errors import InvalidRequestError, did_you_mean
from core.sampling import MAX_SEED
from router.openai_structures import structure_of
from router.validation import Chat, GenerateInput, Prompt, SamplingFields
from text.chat_template import ChatMessage

MAX_CHOICES = 128
COMPLETION_MAX_TOKENS = 16
"""What /v1/completions writes where `max_tokens` is unset: the OpenAI API says so. A chat has no such limit."""

NO_EFFECT = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prediction", "parallel_tool_calls"),
    )
)
"""Accepted whatever they hold: they would not change the output."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

B = TypeVar("B", bound="Body")


def prompts_of(value: object) -> list[Prompt]:
    """A string, token ids, or an array of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [tuple(value)]
        if all(isinstance(item, str) for item in value):
            return list(value)
        if all(isinstance(item, list) and _are_ids(item) for item in value):
            return [tuple(item) for item in value]
    raise InvalidRequestError("prompt", value, "must be a string or an array of token ids, or an array of either")


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def messages_of(value: object) -> Chat:
    if not isinstance(value, list):
        raise InvalidRequestError("messages", value, "must be an array of messages")
    return Chat(tuple(_message(f"messages[{i}]", item) for i, item in enumerate(value)))


def _message(path: str, value: object) -> ChatMessage:
    if not isinstance(value, dict):
        raise InvalidRequestError(path, value, "must be an object with role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequestError(f"{path}.role", role, f"must be one of {', '.join(_ROLES)}")
    for name, item in value.items():
        if name not in ("role", "content", "name") and item not in (None, [], {}):
            raise InvalidRequestError(f"{path}.{name}", item, "is not supported: leave it out")
    return ChatMessage(_ROLES[role], _content(f"{path}.content", value.get("content")))


def _content(path: str, value: object) -> str:
    """A string, or an array of text parts, which belong together."""
    match value:
        case str():
            return value
        case [*parts] if parts:
            return "".join(_part(f"{path}[{i}]", part) for i, part in enumerate(parts))
        case _:
            raise InvalidRequestError(path, value, "must be a string or an array of text parts")


def _part(path: str, value: object) -> str:
    match value:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise InvalidRequestError(f"{path}.type", kind, "must be 'text': other input is not supported yet")
        case _:
            raise InvalidRequestError(path, value, "must be {'type': 'text', 'text': a string}")


def bias_of(values: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """JSON has strings for keys: those are token ids."""
    for name in values:
        if not (name.isascii() and name.isdigit()):
            raise InvalidRequestError("logit_bias", name, "must have token ids for keys, such as '50256'")
    return tuple((int(name), bias) for name, bias in values.items())


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(BaseModel):
    """What both bodies share. A field that is null is a field left out."""

    model_config = ConfigDict(strict=True, extra="forbid")
    not_yet: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are accepted only with these values, which change nothing."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    kv_wire_dtype: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def num_per_prompt(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def num_logprobs(self) -> int | None:
        """How many of the best tokens to tell; None for no log-probabilities at all."""
        raise NotImplementedError

    def fields(self, max_tokens: int | None, choice: int) -> SamplingFields:
        """`choice` counts the n choices of one prompt: each has a seed of its own, the first the one given."""
        seed = (self.seed + choice) % (MAX_SEED + 1) if self.seed is not None and choice else self.seed
        return SamplingFields(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=bias_of(self.logit_bias or {}),
            bad_words=tuple(self.bad_words or ()),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens is not False,
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            structure=structure_of(self),
        )

    def expand(
        self, prompts: list[Prompt], max_tokens: int | None, default_max_tokens: int | None = None
    ) -> list[GenerateInput]:
        """One input per choice: those of the first prompt, then those of the second, and so on."""
        if self.stream_options and not self.stream:
            raise InvalidRequestError("stream_options", "options", "must be left out unless stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs", self.prompt_logprobs, "must be left out where stream is true")
        if not 1 <= self.num_per_prompt * len(prompts) <= MAX_CHOICES:
            limit = f"must be at least 1, and n times the number of prompts at most {MAX_CHOICES}"
            raise InvalidRequestError("n", self.num_per_prompt, limit)
        return [
            GenerateInput(
                prompt,
                self.fields(max_tokens, choice),
                self.model or "",
                default_max_tokens=default_max_tokens,
                cache_salt=self.cache_salt or "",
                kv_wire_dtype=self.kv_wire_dtype or "",
            )
            for prompt in prompts
            for choice in range(self.num_per_prompt)
        ]


class CompletionBody(Body):
    not_yet: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "echo": (None, False),
        "best_of": (None, 1),
        "suffix": (None, ""),
    }

    prompt: Annotated[list[Prompt], PlainValidator(prompts_of)]
    logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def inputs(self) -> list[GenerateInput]:
        return self.expand(self.prompt, self.max_tokens, COMPLETION_MAX_TOKENS)


class ChatBody(Body):
    not_yet: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
    }

    messages: Annotated[Chat, PlainValidator(messages_of)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequestError("top_logprobs", self.top_logprobs, "must be left out unless logprobs is true")
        return None

    def inputs(self) -> list[GenerateInput]:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.expand([self.messages], max_tokens)


def parse_body(kind: type[B], raw: bytes) -> B:
    """`InvalidRequestError` that names the first field at fault."""
    try:
        data = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("body", raw[:20], f"must be JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("body", data, "must be a JSON object")
    for name, harmless in kind.not_yet.items():
        if data.get(name) not in harmless:
            raise InvalidRequestError(name, data[name], "is not supported yet: leave it out")
    try:
        return kind.model_validate({k: v for k, v in data.items() if k not in NO_EFFECT and k not in kind.not_yet})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            fix = f"is no field of this request: {did_you_mean(path, kind.model_fields)}"
        else:
            fix = first["msg"][0].lower() + first["msg"][1:]
        raise InvalidRequestError(path, _input(first), fix) from None


def _input(error: Mapping[str, Any]) -> object:
    """The value at fault; for a missing field that is nothing, not the object around it."""
    return None if error["type"] == "missing" else error["input"]
