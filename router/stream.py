"""What the front doors hold of a request: the stream of its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from core.errors import PenstockError
from core.logprobs import TokenLogprobs
from core.request import FinishReason, Request
from core.stats import RequestStats
from router.info import ClusterInfo


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """All tokens that came since the last delta; the one with a `finish_reason` is the last, and may have none.

    `logprobs` are one for each token, where they were asked for; `prompt_logprobs` come once, with the first token.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class RequestStream:
    """The tokens of one request, for one reader, in order, without gap or repeat.

    Iterating raises a `PenstockError` where the request failed, after the tokens that came before. The router writes
    (`push`, `fail`) and never waits for the reader: what is not read yet is kept, up to `max_buffered_tokens`, and
    comes as one delta. `stats` fills up as the request goes along and is complete at the end.
    """

    def __init__(
        self,
        request_id: str,
        *,
        max_buffered_tokens: int,
        on_cancel: Callable[[], None],
        on_stop: Callable[[], None],
        stats: RequestStats | None = None,
    ) -> None:
        self.request_id = request_id
        self.stats = stats or RequestStats()
        self._max_buffered_tokens = max_buffered_tokens
        self._on_cancel = on_cancel
        self._on_stop = on_stop
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReason | None = None
        self._error: PenstockError | None = None
        self._ended = False  # the last delta was read
        self._ready = asyncio.Event()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenDelta:
        while True:
            if not self._ended and (self._token_ids or self._finish_reason):
                return self._take()
            if self._error:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()

    def cancel(self) -> None:
        """The reader is gone or has changed its mind: frees both workers. No effect on a request that ended."""
        self._on_cancel()

    def stop(self) -> None:
        """The reader has all it wants (a stop string): the request ends as finished by STOP, without another delta."""
        self._ended = True
        self._ready.set()
        self._on_stop()

    def push(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None = None,
        *,
        logprobs: Sequence[TokenLogprobs] = (),
        prompt_logprobs: Sequence[TokenLogprobs] = (),
    ) -> bool:
        """Hand tokens to the reader; False, with nothing taken, where it is too far behind."""
        if len(self._token_ids) + len(token_ids) > self._max_buffered_tokens:
            return False
        self._token_ids.extend(token_ids)
        self._logprobs.extend(logprobs)
        self._prompt_logprobs.extend(prompt_logprobs)
        self._finish_reason = finish_reason
        self._ready.set()
        return True

    def fail(self, error: PenstockError) -> None:
        self._error = error
        self._ready.set()

    def _take(self) -> TokenDelta:
        told = tuple(self._logprobs), tuple(self._prompt_logprobs)
        delta = TokenDelta(tuple(self._token_ids), self._finish_reason, *told)
        for pending in (self._token_ids, self._logprobs, self._prompt_logprobs):
            pending.clear()
        self._ended = delta.finish_reason is not None
        return delta


class RequestDispatcher(Protocol):
    """What the front doors need of `Dispatcher`."""

    def submit(self, request: Request, *, timeout_s: float | None) -> RequestStream:
        """Queue a validated request. `OverloadedError` where the queue is full, `InvalidRequestError` where its id is
        in use or no connected worker could ever hold it. `timeout_s` counts from now; None means no deadline."""

    def cancel(self, request_id: str) -> bool:
        """Stop a request; False where there is none of that id."""

    def info(self) -> ClusterInfo:
        """The cluster as it stands now."""

    @property
    def can_serve(self) -> bool:
        """Whether some worker or pair of workers takes new work."""

    @property
    def max_model_len(self) -> int | None:
        """Most tokens, prompt and output together, that a connected worker can hold; None while there is none."""
