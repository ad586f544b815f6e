"""More than can be served: who waits, who is refused, and what that does to workers."""

from __future__ import annotations

import pytest

from core.errors import DeadlineExceededError, OverloadedError
from router.config import DispatchConfig, PlacementConfig
from router.stream import RequestStream
from tests.router.fake_tokens import continuation
from tests.router.fake_worker import FakeWorker
from tests.router.harness import Harness, harness, read

pytestmark = pytest.mark.anyio


def order(fake: FakeWorker) -> list[str]:
    return [prefill.ticket.request_id for prefill in fake.commands("prefill")]


async def busy(world: Harness) -> RequestStream:
    """The only worker has one request, and goes on with none until it is resumed."""
    (fake,) = world.fakes
    fake.pause("tokens")
    stream = world.submit([1], 3, request_id="first")
    await fake.until_received("prefill")
    return stream


async def test_users_take_turns() -> None:
    async with harness(FakeWorker("m", "mixed", num_credits=1)) as world:
        (fake,) = world.fakes
        streams = [await busy(world)]
        streams += [world.submit([1], 3, request_id=f"{user}{i}", user=user) for user in "ab" for i in range(3)]
        fake.resume("tokens")
        for stream in streams:
            await read(stream)
        assert order(fake) == ["first", "a0", "b0", "a1", "b1", "a2", "b2"]
        await world.idle()


async def test_a_lower_priority_goes_first() -> None:
    async with harness(FakeWorker("m", "mixed", num_credits=1)) as world:
        (fake,) = world.fakes
        streams = [await busy(world)]
        streams += [world.submit([1], 3, request_id=f"p{p}", priority=p) for p in (2, 0, 1, -5)]
        fake.resume("tokens")
        for stream in streams:
            await read(stream)
        assert order(fake) == ["first", "p-5", "p0", "p1", "p2"]
        await world.idle()


async def test_the_earliest_deadline_goes_first() -> None:
    async with harness(FakeWorker("m", "mixed", num_credits=1)) as world:
        (fake,) = world.fakes
        streams = [await busy(world)]
        streams += [world.submit([1], 3, request_id=f"t{t}", timeout_s=float(t)) for t in (9, 7, 8)]
        fake.resume("tokens")
        for stream in streams:
            await read(stream)
        assert order(fake) == ["first", "t7", "t8", "t9"]
        await world.idle()


async def test_a_flood_is_refused_at_once_holds_no_memory_and_blames_no_worker() -> None:
    dispatch = DispatchConfig(max_queue_len=8)
    async with harness(FakeWorker("m", "mixed", num_credits=1), dispatch=dispatch) as world:
        (fake,) = world.fakes
        streams = [await busy(world)]
        streams += [world.submit([i], 3, user=f"user {i}") for i in range(8)]
        for i in range(500):
            with pytest.raises(OverloadedError) as caught:
                world.submit([i], 3, user=f"another {i}")
            assert caught.value.retry_after_s > 0
        assert world.dispatcher.ledger.num_entries == 9
        fake.resume("tokens")
        for stream in streams[1:]:
            assert (await read(stream))[1] is not None
        assert world.dispatcher.counts.failures == {}
        assert (await read(world.submit([7], 3)))[0] == continuation([7], 3)
        await world.idle()


async def test_a_request_whose_time_runs_out_in_the_queue_leaves_it() -> None:
    async with harness(FakeWorker("m", "mixed", num_credits=1)) as world:
        (fake,) = world.fakes
        first = await busy(world)
        with pytest.raises(DeadlineExceededError):
            await read(world.submit([1], 3, timeout_s=0.05))
        fake.resume("tokens")
        await read(first)
        assert order(fake) == ["first"]
        await world.idle()


async def test_a_target_that_no_worker_meets_is_refused_with_a_time_to_come_back() -> None:
    placement = PlacementConfig(slo_ttft_s=1.0)
    async with harness(FakeWorker("m", "mixed"), placement=placement) as world:
        for kind in world.workers.fleet.kinds.values():
            for num_tokens in (100, 1000, 2000):
                kind.prefill.observe(num_tokens, num_tokens * 1e-3)
        with pytest.raises(OverloadedError, match=r"first token would come after about 2 s, 1 s are promised"):
            world.submit([1] * 2000, 3)
        await read(world.submit([1], 3))
        await world.idle()
