"""A stream between a router that never waits and a reader that may."""

from __future__ import annotations

import asyncio

import pytest

from core.errors import UnavailableError
from core.request import FinishReason
from router.stream import RequestStream, TokenDelta

pytestmark = pytest.mark.anyio


class Calls:
    def __init__(self) -> None:
        self.cancelled = 0
        self.stopped = 0

    def cancel(self) -> None:
        self.cancelled += 1

    def stop(self) -> None:
        self.stopped += 1


def stream(calls: Calls | None = None, max_buffered_tokens: int = 10) -> RequestStream:
    calls = calls or Calls()
    return RequestStream("r", max_buffered_tokens=max_buffered_tokens, on_cancel=calls.cancel, on_stop=calls.stop)


async def test_a_reader_that_waits_gets_tokens_as_they_come() -> None:
    tokens = stream()
    reading = asyncio.ensure_future(anext(tokens))
    await asyncio.sleep(0)
    tokens.push([1])
    assert await asyncio.wait_for(reading, 1) == TokenDelta((1,), None)


async def test_what_was_not_read_comes_as_one_delta() -> None:
    tokens = stream()
    tokens.push([1])
    tokens.push([2, 3])
    tokens.push([], FinishReason.STOP)
    assert [delta async for delta in tokens] == [TokenDelta((1, 2, 3), FinishReason.STOP)]


async def test_an_end_without_tokens_is_a_delta_of_its_own() -> None:
    tokens = stream()
    tokens.push([1])
    assert await anext(tokens) == TokenDelta((1,), None)
    tokens.push([], FinishReason.LENGTH)
    assert [delta async for delta in tokens] == [TokenDelta((), FinishReason.LENGTH)]


async def test_a_full_buffer_takes_nothing_and_loses_nothing() -> None:
    tokens = stream(max_buffered_tokens=3)
    assert tokens.push([1, 2])
    assert not tokens.push([3, 4])
    assert tokens.push([3])
    assert (await anext(tokens)).token_ids == (1, 2, 3)
    assert tokens.push([4, 5, 6])


async def test_tokens_come_before_the_error_that_followed_them() -> None:
    tokens = stream()
    tokens.push([1])
    tokens.fail(UnavailableError("gone"))
    assert (await anext(tokens)).token_ids == (1,)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="gone"):
            await anext(tokens)


async def test_a_failure_wakes_a_reader_that_waits() -> None:
    tokens = stream()
    reading = asyncio.ensure_future(anext(tokens))
    await asyncio.sleep(0)
    tokens.fail(UnavailableError("gone"))
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(reading, 1)


async def test_stop_ends_the_iteration_and_tells_the_router() -> None:
    calls = Calls()
    tokens = stream(calls)
    tokens.push([1, 2])
    tokens.stop()
    assert [delta async for delta in tokens] == []
    assert (calls.stopped, calls.cancelled) == (1, 0)


async def test_cancel_tells_the_router() -> None:
    calls = Calls()
    stream(calls).cancel()
    assert (calls.stopped, calls.cancelled) == (0, 1)
