"""From running generations to bytes on an HTTP connection, for as long as somebody listens."""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core.errors import PenstockError
from router.errors import InternalServerError, http_error
from router.generation import Generator, TextDelta
from router.merging import Event, merge, start_all
from router.openai_choices import Choice
from router.openai_logprobs import Json
from router.openai_responses import Writer
from router.validation import ValidRequest

_log = logging.getLogger(__name__)


class Choices:
    """The generations of one call, running side by side. All are queued, or none."""

    def __init__(
        self, generator: Generator, valids: Sequence[ValidRequest], make_choice: Callable[[int, bool], Choice]
    ) -> None:
        """`make_choice(num_prompt_tokens, keep)` reads a choice."""
        self.prompts = [valid.request.prompt_token_ids for valid in valids]
        self._make_choice = make_choice
        self._generations = start_all(generator, valids)

    def readers(self, *, keep: bool) -> list[Choice]:
        return [self._make_choice(len(prompt), keep) for prompt in self.prompts]

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """(index of the choice, event), as they come. The first failure ends it all."""
        if len(self._generations) == 1:
            async for event in self._generations[0]:
                yield 0, event
            return
        async with aclosing(merge(self._generations)) as events:
            async for index, came in events:
                if isinstance(came, Exception):
                    raise came
                yield index, came

    def close(self) -> None:
        """Cancels what has not ended. Idempotent."""
        for generation in self._generations:
            generation.close()


class Answer(Response, ABC):
    """Starts the generations when the response is due, and cancels them when the client goes away."""

    media_type = "application/json"

    def __init__(self, start: Callable[[], Choices], writer: Writer) -> None:
        super().__init__()
        self._start = start
        self._writer = writer

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Raises a `PenstockError` where nothing was sent yet."""
        choices = self._start()
        sending = asyncio.create_task(self._send(choices, send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            choices.close()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    @abstractmethod
    async def _send(self, choices: Choices, send: Send) -> None: ...

    async def _begin(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


class WholeAnswer(Answer):
    """One JSON object, when all choices have ended."""

    async def _send(self, choices: Choices, send: Send) -> None:
        taken = choices.readers(keep=True)
        async with aclosing(choices.events()) as events:
            async for index, event in events:
                taken[index].take(event)
        body = to_json(self._writer.whole(taken, choices.prompts))
        self.headers["content-length"] = str(len(body))
        await self._begin(send)
        await send({"type": "http.response.body", "body": body})


class StreamedAnswer(Answer):
    """Server-sent events. The response begins with the first event, so that what fails before has a status of its own.

    A failure after that is one more event; then the stream ends, without `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, start: Callable[[], Choices], writer: Writer, *, include_usage: bool) -> None:
        super().__init__(start, writer)
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self._include_usage = include_usage

    async def _send(self, choices: Choices, send: Send) -> None:
        begun = False
        try:
            async with aclosing(self._events(choices)) as events:
                async for event in events:
                    if not begun:
                        await self._begin(send)
                        begun = True
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            if not begun:
                raise
            if not isinstance(error, PenstockError):
                _log.exception("%s failed", self._writer.answer_id)
                error = InternalServerError()
            await send({"type": "http.response.body", "body": sse(http_error(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, choices: Choices) -> AsyncGenerator[bytes]:
        taken = choices.readers(keep=False)
        offsets = [0] * len(taken)  # in characters, of tokens with log-probabilities
        opened: set[int] = set()
        async with aclosing(choices.events()) as events:
            async for index, event in events:
                choice = taken[index]
                if index not in opened:
                    opened.add(index)
                    opening = self._writer.opening(index, choice)
                    if opening:
                        yield sse(opening)
                part = choice.take(event)
                for chunk in self._writer.chunks(index, event, part, choice, offsets[index]):
                    yield sse(chunk)
                if isinstance(event, TextDelta):
                    offsets[index] += self._writer.num_characters(event.logprobs)
        if self._include_usage:
            yield sse(self._writer.usage_chunk(taken))
        yield b"data: [DONE]\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def to_json(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sse(value: Json) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
