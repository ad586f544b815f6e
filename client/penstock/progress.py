"""One generation without its I/O: what has come, what ended it, whether to try again. Sync and async read it alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import grpc

from penstock.errors import InternalError, PenstockError, RequestCancelledError, UnavailableError
from penstock.retry import RetryPolicy
from penstock.rpc import Event, Finished, Started, resumed
from penstock.status import error_from
from penstock.types import Delta, TokenLogprobs
from penstock.v1.inference_pb2 import GenerateRequest


class Progress:
    """Folds the events of all attempts at one request. `timeout_s` (inf is no limit) holds for them together.

    An attempt goes on where the last one ended, on whatever server: `target` is the current one. `lost`: the last one
    failed for its server could not be reached, or went away.

    ```
    open ──▶ over (Finished has come, and the stream's end)
      └────▶ failed (`open` raises the error from then on)
    ```
    """

    def __init__(
        self, request_id: str, *, target: str, timeout_s: float, retry: RetryPolicy, clock: Callable[[], float]
    ) -> None:
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.started: Started | None = None
        self.finished: Finished | None = None
        self._request_id = request_id
        self._seed: int | None = None
        self.target = target
        self._deadline_s = clock() + timeout_s
        self._retry = retry
        self._clock = clock
        self._num_retries = 0
        self.lost = False
        self._resumes = False
        self._over = False
        self._error: PenstockError | None = None

    @property
    def request_id(self) -> str | None:
        """The server's, once it has answered; None where neither side has named one."""
        return (self.started.request_id if self.started else "") or self._request_id or None

    @property
    def closed(self) -> bool:
        """Nothing more will come, well or not."""
        return self._over or self._error is not None

    def remaining_s(self) -> float | None:
        """Time left for an attempt, as gRPC takes it: None is no limit."""
        return None if math.isinf(self._deadline_s) else max(0.0, self._deadline_s - self._clock())

    def open(self) -> bool:
        """Whether more may come. Raises the error that ended the generation, if one did."""
        if self._error is not None:
            raise self._error
        return not self._over

    def take(self, event: Event | None) -> Delta | None:
        """Take in the next event; returns it where it is a delta."""
        match event:
            case Delta():
                self.token_ids.extend(event.token_ids)
                self.texts.append(event.text)
                self.logprobs.extend(event.logprobs)
                self.prompt_logprobs.extend(event.prompt_logprobs)
                return event
            case Started():
                self.started = event
            case Finished():
                self.finished = event
        return None

    def end(self) -> None:
        """The stream has ended without an error. Raises `InternalError` where its last event is missing."""
        if self.finished is None:
            error = InternalError(f"{self.target} ended the stream early ({len(self.token_ids)} tokens had come)")
            error.request_id, error.num_tokens = self.request_id, len(self.token_ids)
            self._fail(error)
        self._over = True

    def fail(self, failure: grpc.RpcError) -> float | None:
        """The attempt has failed: seconds to wait before the next one, or None where only the stream's end was missing.

        Raises the failure as our error where another attempt is out of the question.
        """
        if self.finished is not None:
            self._over = True
            return None
        self.open()
        num_tokens = len(self.token_ids) if self.started or self.token_ids else None
        error = error_from(failure, target=self.target, request_id=self.request_id, num_tokens=num_tokens)
        delay_s = self._delay_s(error)
        if delay_s is None:
            self._fail(error, failure)
        self._num_retries += 1
        self.lost = isinstance(error, UnavailableError)
        self._request_id = self.request_id or ""
        if self.started:
            self._seed = self.started.seed
        self._resumes = self._resumes or self.lost or self.started is not None
        self.started = None
        return delay_s

    def again(self, request: GenerateRequest) -> GenerateRequest:
        """`request` as it is to be sent now: on a retry with what has come, so that the server goes on from there."""
        if not self._resumes:
            return request
        return resumed(request, self._request_id, self._seed, self.token_ids, sum(len(text) for text in self.texts))

    def close(self) -> None:
        """Give up what has not come yet: from now on `open` raises `RequestCancelledError`. Nothing if it has ended."""
        if self.closed:
            return
        num_tokens = len(self.token_ids)
        self._error = RequestCancelledError(f"closed by this client ({num_tokens} tokens had come)")
        self._error.request_id, self._error.num_tokens = self.request_id, num_tokens

    def _fail(self, error: PenstockError, cause: BaseException | None = None) -> NoReturn:
        self._error = error
        raise error from cause

    def _delay_s(self, error: PenstockError) -> float | None:
        """None where a server refuses to go on after a token has come, or where no time would be left."""
        if self.token_ids and not isinstance(error, UnavailableError):
            return None
        delay_s = self._retry.delay_s(error, self._num_retries)
        return delay_s if delay_s is not None and self._clock() + delay_s < self._deadline_s else None
