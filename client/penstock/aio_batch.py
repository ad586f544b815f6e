"""Many generations in one call, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING

import grpc

from penstock.batch import BatchProgress, IndexedDelta
from penstock.compat import being_cancelled
from penstock.types import Result
from penstock.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from typing import Self

    BatchCall = grpc.aio.UnaryStreamCall[pb.GenerateBatchRequest, pb.GenerateBatchResponse]


class AsyncBatch:
    """An asynchronous iterator over what comes for any of the prompts: `(index, delta)`.

    A prompt whose generation fails has an `error` in its result, and the others go on; what ends all is raised. Closing
    it, or cancelling the task that reads it, cancels all that is left on the server.
    """

    def __init__(
        self, progress: BatchProgress, start: Callable[[], BatchCall], sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self._progress = progress
        self._start = start
        self._sleep = sleep
        self._call = start()

    async def results(self) -> list[Result]:
        """One for each prompt, in their order: runs to the end. Raises what iterating raises."""
        async for _ in self:
            pass
        return self._progress.results()

    def __aiter__(self) -> AsyncIterator[IndexedDelta]:
        return self

    async def __anext__(self) -> IndexedDelta:
        while self._progress.open():
            try:
                response = await self._call.read()
            except asyncio.CancelledError:
                closed = self._progress.closed
                await self.aclose()
                if not being_cancelled(closed=closed):
                    self._progress.open()
                raise
            except grpc.RpcError as failure:
                await self._sleep(self._progress.fail(failure))
                self._call = self._start()
                continue
            if not isinstance(response, pb.GenerateBatchResponse):
                self._progress.end()
            elif (delta := self._progress.take(response)) is not None:
                return delta
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel what has not come yet. Idempotent."""
        self._progress.close()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
