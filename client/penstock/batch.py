"""Many generations in one call: what both clients share, and the one for threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import grpc

from penstock.errors import InternalError, PenstockError, RequestCancelledError, UnavailableError
from penstock.retry import RetryPolicy
from penstock.rpc import Finished, Started, event_of
from penstock.status import error_from, error_of_status
from penstock.types import Delta, Result
from penstock.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from typing import Self

IndexedDelta = tuple[int, Delta]
"""Which of the prompts, counted from 0, and what has come for it."""


class BatchCall(Iterator[pb.GenerateBatchResponse], Protocol):
    """What the stub's `GenerateBatch` returns."""

    def cancel(self) -> bool: ...


class BatchProgress:
    """Folds the responses of all attempts at one batch. `timeout_s` (inf is no limit) holds for them together."""

    def __init__(
        self, num_prompts: int, *, target: str, timeout_s: float, retry: RetryPolicy, clock: Callable[[], float]
    ) -> None:
        self._deltas: list[list[Delta]] = [[] for _ in range(num_prompts)]
        self._started: dict[int, Started] = {}
        self._ends: dict[int, Finished | PenstockError] = {}
        self.target, self._retry, self._clock = target, retry, clock
        self._deadline_s = clock() + timeout_s
        self._num_retries = 0
        self.lost = False
        self._over = False
        self._error: PenstockError | None = None

    def remaining_s(self) -> float | None:
        """Time left for an attempt, as gRPC takes it: None is no limit."""
        return None if math.isinf(self._deadline_s) else max(0.0, self._deadline_s - self._clock())

    @property
    def closed(self) -> bool:
        """Nothing more will come, well or not."""
        return self._over or self._error is not None

    def open(self) -> bool:
        """Whether more may come. Raises the error that ended the batch, if one did."""
        if self._error is not None:
            raise self._error
        return not self._over

    def take(self, response: pb.GenerateBatchResponse) -> IndexedDelta | None:
        """Take in the next response; returns it where it is a delta."""
        index = response.index
        if index >= len(self._deltas):
            raise InternalError(f"{self.target} answered prompt {index} of {len(self._deltas)}")
        if response.HasField("error"):
            self._ends[index] = error_of_status(response.error, target=self.target)
            return None
        match event_of(response.response):
            case Delta() as delta:
                self._deltas[index].append(delta)
                return index, delta
            case Started() as started:
                self._started[index] = started
            case Finished() as finished:
                self._ends[index] = finished
        return None

    def end(self) -> None:
        """The stream has ended without an error. Raises `InternalError` where a prompt has had no end."""
        self._over = True
        if len(self._ends) < len(self._deltas):
            missing = len(self._deltas) - len(self._ends)
            self._error = InternalError(f"{self.target} ended the stream before the end of {missing} generations")
            raise self._error

    def fail(self, failure: grpc.RpcError) -> float:
        """Seconds to wait before another attempt. Raises the failure as our error where that is out of the question."""
        self.open()
        error = error_from(failure, target=self.target)
        delay_s = None if self._started else self._retry.delay_s(error, self._num_retries)
        if delay_s is None or self._clock() + delay_s >= self._deadline_s:
            self._error = error
            raise error from failure
        self._num_retries += 1
        self.lost = isinstance(error, UnavailableError)
        return delay_s

    def close(self) -> None:
        """Give up what has not come yet: from now on `open` raises `RequestCancelledError`. Nothing if it has ended."""
        if not self._over and self._error is None:
            self._error = RequestCancelledError("closed by this client")

    def results(self) -> list[Result]:
        """What has come of each prompt, in their order."""
        return [self._result(index) for index in range(len(self._deltas))]

    def _result(self, index: int) -> Result:
        deltas, end, started = self._deltas[index], self._ends.get(index), self._started.get(index)
        finished = end if isinstance(end, Finished) else None
        return Result(
            request_id=started.request_id if started else None,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            logprobs=tuple(told for delta in deltas for told in delta.logprobs),
            prompt_logprobs=tuple(told for delta in deltas for told in delta.prompt_logprobs),
            finish_reason=finished.finish_reason if finished else None,
            usage=finished.usage if finished else None,
            stats=finished.stats if finished else None,
            error=end if isinstance(end, PenstockError) else None,
        )


class Batch:
    """An iterator over what comes for any of the prompts: `(index, delta)`.

    A prompt whose generation fails has an `error` in its result, and the others go on; what ends all is raised. Closing
    it, or letting go of it before its end, cancels all that is left on the server.
    """

    def __init__(self, progress: BatchProgress, start: Callable[[], BatchCall], sleep: Callable[[float], None]) -> None:
        self._progress = progress
        self._start = start
        self._sleep = sleep
        self._call = start()

    @property
    def results(self) -> list[Result]:
        """One for each prompt, in their order: runs to the end. Raises what iterating raises."""
        for _ in self:
            pass
        return self._progress.results()

    def __iter__(self) -> Iterator[IndexedDelta]:
        return self

    def __next__(self) -> IndexedDelta:
        while self._progress.open():
            try:
                response = next(self._call, None)
            except grpc.RpcError as failure:
                self._sleep(self._progress.fail(failure))
                self._call = self._start()
                continue
            if response is None:
                self._progress.end()
            elif (delta := self._progress.take(response)) is not None:
                return delta
        raise StopIteration

    def close(self) -> None:
        """Cancel what has not come yet. Idempotent."""
        self._progress.close()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
