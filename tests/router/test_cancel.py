"""Whoever stops a request, and whenever: both workers are free at once."""

from __future__ import annotations

import asyncio
import random

import pytest

from core.errors import DeadlineExceededError, OverloadedError, PenstockError, RequestCancelledError, UnavailableError
from core.events import LifecycleEvent
from core.request import FinishReason
from router.config import DispatchConfig
from router.stream import RequestStream
from tests.router.fake_tokens import continuation
from tests.router.fake_worker import WAIT_S, FakeWorker
from tests.router.harness import Harness, harness, pair_of_workers, read, read_some

pytestmark = pytest.mark.anyio
PROMPT = [5, 6, 7]


@pytest.mark.parametrize("stage", ["reserve", "prefill", "accept", "tokens"])
async def test_cancel_in_any_stage_frees_both_sides(stage: str) -> None:
    async with pair_of_workers() as (world, prefill, decode):
        paused = prefill if stage == "prefill" else decode
        paused.pause(stage)
        stream = world.submit(PROMPT, 12, request_id="mine")
        if stage == "tokens":
            await world.seen.until_event("mine", LifecycleEvent.ACCEPTED)
        else:
            await paused.until_received(stage)
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            await read(stream)
        await world.idle()
        assert world.seen.of("mine")[-1] == "cancelled"
        assert len(prefill.commands("cancel")) == (1 if stage in ("prefill", "accept") else 0)
        assert len(decode.commands("cancel")) == 1
        paused.resume(stage)
        assert (await read(world.submit(PROMPT, 12)))[0] == continuation(PROMPT, 12)
        await world.idle()


async def test_a_queued_request_is_cancelled_without_a_word_to_workers() -> None:
    async with harness() as world:
        stream = world.submit(PROMPT)
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            await read(stream)
        await world.idle()


async def test_cancel_twice_or_after_the_end_changes_nothing() -> None:
    async with pair_of_workers() as (world, _, decode):
        stream = world.submit(PROMPT, 4)
        assert (await read(stream))[1] is FinishReason.LENGTH
        stream.cancel()
        stream.cancel()
        await world.idle()
        assert decode.commands("cancel") == []
        assert world.seen.of("r0").count("cancelled") == 0


async def test_cancel_by_id_says_whether_there_was_such_a_request() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 4, request_id="mine")
        assert world.dispatcher.cancel("mine")
        assert not world.dispatcher.cancel("mine")
        assert not world.dispatcher.cancel("never heard of")
        with pytest.raises(RequestCancelledError):
            await read(stream)
        await world.idle()


async def test_a_deadline_ends_a_running_request_and_frees_both_sides() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 12, request_id="mine", timeout_s=0.1)
        assert list((await anext(stream)).token_ids) == continuation(PROMPT, 1)
        with pytest.raises(DeadlineExceededError, match=r"0\.1 s"):
            await read(stream)
        await world.idle()
        assert world.seen.of("mine")[-1] == "failed"


async def test_a_deadline_ends_a_queued_request() -> None:
    async with harness() as world:
        with pytest.raises(DeadlineExceededError):
            await read(world.submit(PROMPT, timeout_s=0.05))
        await world.idle()


async def test_a_deadline_that_is_met_has_no_effect() -> None:
    async with pair_of_workers() as (world, _, _):
        stream = world.submit(PROMPT, 2, timeout_s=0.5)
        assert (await read(stream))[1] is FinishReason.LENGTH
        await world.idle()
        assert world.seen.entries["r0"].deadline_timer is not None
        assert world.seen.entries["r0"].deadline_timer.cancelled()


async def test_a_client_that_does_not_read_is_cancelled_and_hurts_nobody() -> None:
    async with pair_of_workers(DispatchConfig(stream_buffer_tokens=20)) as (world, _, _):
        slow = world.submit(PROMPT, 1000, request_id="slow")
        await world.seen.until_event("slow", LifecycleEvent.FAILED)
        assert (await read(world.submit([1, 2], 10)))[0] == continuation([1, 2], 10)
        assert await read_some(slow, 20) == continuation(PROMPT, 20)
        with pytest.raises(OverloadedError, match="reads too slowly"):
            await anext(slow)
        await world.idle()


async def test_closing_the_dispatcher_fails_what_is_left() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.pause("tokens")
        stream = world.submit(PROMPT, 4)
        world.dispatcher.close()
        with pytest.raises(UnavailableError, match="shutting down"):
            await read(stream)
        await world.idle()


async def test_two_hundred_requests_with_random_cancels_leave_nothing_behind() -> None:
    """A fifth is cancelled at a random moment; workers refuse and fail now and then, and one dies."""
    rng = random.Random(20)
    fakes = [
        FakeWorker(f"{role}-{i}", role, num_credits=16, num_blocks=64) for role in ("prefill", "decode") for i in (0, 1)
    ]
    async with harness(*fakes, dispatch=DispatchConfig(max_attempts=10)) as world:
        await world.until_routes(4)
        for fake in fakes:
            fake.script.fail = {"prefill": 2, "reserve": 2, "accept": 2, "tokens": 2}
            fake.script.refuse = 3
        async with asyncio.timeout(3 * WAIT_S):
            ends = await asyncio.gather(*(one_client(world, rng, number) for number in range(200)), kill_in_turn(world))
        await world.idle()
        assert ends.count("cancelled") >= 20
        assert ends.count("complete") + ends.count("cancelled") == 200


async def one_client(world: Harness, rng: random.Random, number: int) -> str:
    prompt = [rng.randrange(1000) for _ in range(rng.randrange(1, 80))]
    max_tokens = rng.randrange(1, 30)
    cancel_after = rng.randrange(0, max_tokens) if rng.random() < 0.2 else None
    stream: RequestStream = world.submit(prompt, max_tokens, request_id=f"n{number}", timeout_s=None)
    streamed: list[int] = []
    try:
        if cancel_after is not None:
            streamed += await read_some(stream, cancel_after)
            stream.cancel()
        rest, _ = await read(stream)
        streamed += rest
    except RequestCancelledError:
        assert streamed == continuation(prompt, max_tokens)[: len(streamed)]
        return "cancelled"
    except PenstockError as error:
        return repr(error)
    assert streamed == continuation(prompt, max_tokens)
    return "complete"


async def kill_in_turn(world: Harness) -> str:
    """Each worker's session drops once, at some point of the run."""
    for fake in world.fakes:
        await fake.until(lambda fake=fake: len(fake.received) > 60)  # type: ignore[misc]
        fake.drop_session()
        world.check()
    return "chaos"
