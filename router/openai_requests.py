"""Bodies of the OpenAI API: what we heed, what we may ignore, and what we must refuse by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator, ValidationError, WithJsonSchema

from core.errors import InvalidRequestError, did_you_mean
from core.sampling import MAX_SEED
from router.openai_messages import MESSAGES_SCHEMA, messages_of
from router.openai_structures import RESPONSE_FORMAT_SCHEMA, STRUCTURED_OUTPUTS_SCHEMA, structure_of
from router.openai_tools import TOOL_CHOICE_SCHEMA, TOOLS_SCHEMA, ToolUse
from router.validation import MAX_STOPS, GenerateInput, Prompt, SamplingFields
from text.chat_template import Chat, ChatMessage
from text.tools.calls import Tool

MAX_CHOICES = 128
MAX_DOCUMENTS = 1024
COMPLETION_MAX_TOKENS = 16
"""What /v1/completions writes where `max_tokens` is unset: the OpenAI API says so. A chat has no such limit."""

NO_EFFECT = frozenset(
    (
        *("metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prediction"),
    )
)
NOT_YET: Mapping[str, tuple[Any, ...]] = {
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "spaces_between_special_tokens": (None, True),
    "logits_processors": (None, []),
    "kv_transfer_params": (None, {}),
    "vllm_xargs": (None, {}),
}
"""Fields of vLLM that may only say what holds anyway."""

B = TypeVar("B", bound="Fields")


_TOKEN_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "minItems": 1, "items": _TEXT_SCHEMA},
        {"type": "array", "minItems": 1, "items": _TOKEN_IDS_SCHEMA},
    ]
}
STOP_SCHEMA = {
    "anyOf": [
        _TEXT_SCHEMA,
        {"type": "array", "maxItems": MAX_STOPS, "items": _TEXT_SCHEMA},
        {"type": "null"},
    ]
}


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
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Fields(BaseModel):
    """A field that is null is a field left out."""

    model_config = ConfigDict(strict=True, extra="forbid")
    no_effect: ClassVar[frozenset[str]] = frozenset()
    """Accepted whatever they hold: they would not change the output."""
    not_yet: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are accepted only with these values, which change nothing."""


class Body(Fields):
    """What both bodies share."""

    no_effect: ClassVar[frozenset[str]] = NO_EFFECT

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    kv_wire_dtype: str | None = None
    disaggregate: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list), WithJsonSchema(STOP_SCHEMA)] = None
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
    response_format: Annotated[dict[str, Any] | None, WithJsonSchema(RESPONSE_FORMAT_SCHEMA)] = None
    structured_outputs: Annotated[dict[str, Any] | None, WithJsonSchema(STRUCTURED_OUTPUTS_SCHEMA)] = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Usage so far in every chunk."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

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
        num_choices = self.num_per_prompt * len(prompts)
        return [
            GenerateInput(
                prompt,
                self.fields(max_tokens, choice),
                self.model or "",
                request_id=self._request_id(i * self.num_per_prompt + choice, num_choices),
                default_max_tokens=default_max_tokens,
                cache_salt=self.cache_salt or "",
                kv_wire_dtype=self.kv_wire_dtype or "",
                disaggregate=self.disaggregate or "",
                priority=self.priority or 0,
                user=self.user or "",
                add_special_tokens=self.add_special_tokens,
                truncate_prompt_tokens=self.truncate_prompt_tokens,
            )
            for i, prompt in enumerate(prompts)
            for choice in range(self.num_per_prompt)
        ]

    def _request_id(self, index: int, num_choices: int) -> str:
        """Of several choices each is a request, with an id of its own."""
        return (
            self.request_id
            if self.request_id and num_choices == 1
            else f"{self.request_id}-{index}"
            if self.request_id
            else ""
        )


class CompletionBody(Body):
    not_yet: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NOT_YET,
        "echo": (None, False),
        "best_of": (None, 1),
        "suffix": (None, ""),
    }

    prompt: Annotated[list[Prompt], PlainValidator(prompts_of), WithJsonSchema(PROMPT_SCHEMA)]
    logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def inputs(self) -> list[GenerateInput]:
        return self.expand(self.prompt, self.max_tokens, COMPLETION_MAX_TOKENS)


class ChatBody(Body):
    not_yet: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NOT_YET,
        "echo": (None, False),
        "chat_template": (None,),
        "mm_processor_kwargs": (None, {}),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
    }

    messages: Annotated[tuple[ChatMessage, ...], PlainValidator(messages_of), WithJsonSchema(MESSAGES_SCHEMA)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[dict[str, Any]] | None, WithJsonSchema(TOOLS_SCHEMA)] = None
    tool_choice: Annotated[str | dict[str, Any] | None, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequestError("top_logprobs", self.top_logprobs, "must be left out unless logprobs is true")
        return None

    def inputs(self, tools: Sequence[Tool] = (), use: ToolUse | None = None) -> list[GenerateInput]:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        inputs = self.expand([chat_of(self, tools)], max_tokens)
        return [replace(each, sampling=self._with_tools(each.sampling, use)) for each in inputs] if use else inputs

    def _with_tools(self, sampling: SamplingFields, use: ToolUse) -> SamplingFields:
        """What marks a call may be special tokens. No other structure would leave room for a call."""
        if sampling.structure is not None:
            fix = "must be left out beside tools, unless tool_choice is 'none'"
            raise InvalidRequestError(sampling.structure.field, sampling.structure.text, fix)
        return replace(sampling, structure=use.structure, skip_special_tokens=self.skip_special_tokens is True)


class Templated(Protocol):
    """What a chat template is given."""

    messages: tuple[ChatMessage, ...]
    documents: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


def chat_of(body: Templated, tools: Sequence[Tool] = ()) -> Chat:
    continued = bool(body.continue_final_message)
    if continued and body.add_generation_prompt:
        fix = "must be left out where continue_final_message is true"
        raise InvalidRequestError("add_generation_prompt", True, fix)
    variables = body.chat_template_kwargs or {}
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        if name in variables:
            raise InvalidRequestError(f"chat_template_kwargs.{name}", variables[name], "must be a field of its own")
    if len(body.documents or ()) > MAX_DOCUMENTS:
        raise InvalidRequestError(
            "documents", f"{len(body.documents or ())} documents", f"must be at most {MAX_DOCUMENTS}"
        )
    return Chat(
        body.messages,
        tools=tuple(tool.definition for tool in tools),
        documents=tuple(json.dumps(document, ensure_ascii=False) for document in body.documents or ()),
        variables=json.dumps(variables, ensure_ascii=False) if variables else "",
        add_generation_prompt=not continued and body.add_generation_prompt is not False,
        continue_last=continued,
    )


def parse_json(raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("body", raw[:20], f"must be JSON in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("body", data, "must be a JSON object")
    return data


def parse_body(kind: type[B], raw: bytes) -> B:
    """`InvalidRequestError` that names the first field at fault."""
    data = parse_json(raw)
    for name, harmless in kind.not_yet.items():
        if not any(type(data.get(name)) is type(value) and data.get(name) == value for value in harmless):
            raise InvalidRequestError(name, data[name], "is not supported yet: leave it out")
    try:
        return kind.model_validate({k: v for k, v in data.items() if k not in kind.no_effect and k not in kind.not_yet})
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
