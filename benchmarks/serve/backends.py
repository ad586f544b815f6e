"""How a plan becomes a request, by server: the OpenAI API over HTTP, or our own gRPC."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serve.driver import Answer, Clock, Exchange, RequestError
from benchmarks.serve.http_stream import HttpError, HttpStream, Url, request_bytes, sse_data
from benchmarks.serve.workload import Plan, Prompts
from penstock import AsyncClient, PenstockError

JSON_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What all requests have in common. `extra_body` is added to each, and wins."""

    model: str
    prompts: Prompts
    temperature: float = 0.0
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] = field(default_factory=dict)


class OpenAIBackend:
    """`/v1/completions` with token ids as the prompt, or, with `chat`, `/v1/chat/completions` with words.

    A chat has about as many tokens as planned; the server's own count is what is reported.
    """

    def __init__(self, url: Url, shape: Shape, *, chat: bool = False, headers: Mapping[str, str] | None = None) -> None:
        self._url = url
        self._shape = shape
        self._chat = chat
        self._headers = {**JSON_HEADERS, **(headers or {})}

    def prepare(self, plan: Plan) -> Exchange:
        return _OpenAIExchange(self._url, request_bytes("POST", self._url, self._headers, self._body(plan)), self._chat)

    def _body(self, plan: Plan) -> bytes:
        shape = self._shape
        ids = shape.prompts.token_ids(plan)
        prompt: dict[str, Any] = {"prompt": ids}
        if self._chat:
            prompt = {"messages": [{"role": "user", "content": " ".join(map(word, ids))}]}
        more = {"ignore_eos": True} if shape.ignore_eos else {}
        body = {
            "model": shape.model,
            **prompt,
            "max_tokens": plan.num_outputs,
            "temperature": shape.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
            **shape.extra_body,
        }
        return json.dumps(body, separators=(",", ":")).encode()


class _OpenAIExchange:
    def __init__(self, url: Url, request: bytes, chat: bool) -> None:
        self.answer = Answer()
        self._url, self._request, self._chat = url, request, chat

    async def run(self, clock: Clock) -> None:
        try:
            async with HttpStream(self._url, self._request) as stream:
                if stream.status != 200:
                    raise RequestError(f"HTTP {stream.status}: {error_message(await stream.body())}")
                await self._read(stream, clock)
        except HttpError as error:
            raise RequestError(str(error)) from error

    async def _read(self, stream: HttpStream, clock: Clock) -> None:
        buffer = bytearray()
        async for piece in stream.pieces():
            at_s = clock()
            buffer += piece
            for data in sse_data(buffer):
                if data == b"[DONE]":
                    return
                self._take(data, at_s)
        raise RequestError("the stream ended before [DONE]")

    def _take(self, data: bytes, at_s: float) -> None:
        try:
            event = json.loads(data)
            if "error" in event:
                raise RequestError(error_message(data))
            if usage := event.get("usage"):
                self.answer.num_inputs = usage["prompt_tokens"]
                self.answer.num_outputs = usage["completion_tokens"]
            if any(brings_tokens(choice, self._chat) for choice in event.get("choices", ())):
                self.answer.tokens_s.append(at_s)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"an event that is none of the OpenAI API: {data[:80]!r}") from error


def brings_tokens(choice: Mapping[str, Any], chat: bool) -> bool:
    """Token ids do, where they were asked for (`return_token_ids`). Else text does; so does an empty text of an answer
    that goes on: a token that makes half a character. A chat opens with its role, and both may close with a finish
    reason alone.
    """
    if choice.get("token_ids") is not None:
        return bool(choice["token_ids"])
    goes_on = choice.get("finish_reason") is None
    if not chat:
        return bool(choice.get("text")) or goes_on
    delta = choice.get("delta") or {}
    told = any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls"))
    return told or (goes_on and "role" not in delta)


def error_message(body: bytes) -> str:
    """The message of an OpenAI error, else the beginning of what came."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        return str(error["message"])[:200]
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:200].decode(errors="replace")


def word(token_id: int) -> str:
    """A word for a number; mostly one token in vocabularies of English."""
    return _WORDS[token_id % len(_WORDS)]


_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "house", "water")


class PenstockBackend:
    """Our own gRPC API, which tells how many tokens each message brings. Owns no connection: `client` does."""

    def __init__(self, client: AsyncClient, shape: Shape) -> None:
        self._client = client
        self._shape = shape

    def prepare(self, plan: Plan) -> Exchange:
        return _PenstockExchange(self._client, self._shape, plan)


class _PenstockExchange:
    def __init__(self, client: AsyncClient, shape: Shape, plan: Plan) -> None:
        self.answer = Answer()
        self._client, self._shape, self._max_tokens = client, shape, plan.num_outputs
        self._token_ids = shape.prompts.token_ids(plan)

    async def run(self, clock: Clock) -> None:
        try:
            generation = self._client.generate(
                token_ids=self._token_ids,
                model=self._shape.model,
                max_tokens=self._max_tokens,
                temperature=self._shape.temperature,
                ignore_eos=self._shape.ignore_eos,
            )
            async with generation:
                async for delta in generation:
                    if delta.token_ids:
                        self.answer.tokens_s.append(clock())
            if generation.usage:
                self.answer.num_inputs = generation.usage.num_prompt_tokens
                self.answer.num_outputs = generation.usage.num_output_tokens
        except PenstockError as error:
            raise RequestError(f"{error.code}: {error}") from error
