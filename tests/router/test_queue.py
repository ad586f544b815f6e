"""Late binding: who waits, who goes first, who is turned away."""

from __future__ import annotations

import pytest

from core.errors import InvalidRequestError, OverloadedError, UnavailableError
from core.events import LifecycleEvent
from router.config import DispatchConfig
from tests.router.fake_tokens import continuation
from tests.router.fake_worker import FakeWorker
from tests.router.harness import harness, pair_of_workers, read

pytestmark = pytest.mark.anyio
PROMPT = [5, 6, 7]


async def test_a_request_waits_for_workers_to_come() -> None:
    async with harness() as world:
        stream = world.submit(PROMPT, 4)
        assert world.dispatcher.info().num_queued == 1
        await world.add(FakeWorker("p", "prefill"), FakeWorker("d", "decode"))
        assert (await read(stream))[0] == continuation(PROMPT, 4)
        await world.idle()


async def test_no_worker_gets_more_than_its_credits() -> None:
    prefill, decode = FakeWorker("p", "prefill", num_credits=8), FakeWorker("d", "decode", num_credits=3)
    async with harness(prefill, decode) as world:
        streams = [world.submit([i], 6) for i in range(20)]
        for i, stream in enumerate(streams):
            assert (await read(stream))[0] == continuation([i], 6)
        assert decode.max_held == 3
        await world.idle()


async def test_a_request_without_room_on_the_decode_side_is_unknown_to_every_worker() -> None:
    prefill, decode = FakeWorker("p", "prefill"), FakeWorker("d", "decode", num_blocks=2)
    async with harness(prefill, decode) as world:
        await world.until_routes(1)
        decode.pause("tokens")
        first = world.submit([1] * 20, 4)  # takes both blocks
        second = world.submit([2] * 20, 4)
        await decode.until_received("accept")
        assert len(decode.commands("reserve")) == len(prefill.commands("prefill")) == 1
        assert world.dispatcher.info().num_queued == 1
        decode.resume("tokens")
        for token, stream in ((1, first), (2, second)):
            assert (await read(stream))[0] == continuation([token] * 20, 4)
        assert world.dispatcher.counts.refusals == {}
        await world.idle()


@pytest.mark.parametrize("role", ["decode", "mixed"])
async def test_blocks_that_a_workers_load_shows_as_taken_are_not_counted_twice(role: str) -> None:
    holder = FakeWorker("d", role, num_blocks=4)
    async with harness(holder, *([FakeWorker("p", "prefill")] if role == "decode" else [])) as world:
        await world.until_routes(1)
        holder.pause("tokens")
        streams = []
        for i in range(2):  # two blocks each
            streams.append(world.submit([i] * 20, 4, request_id=f"n{i}"))
            await world.seen.until_event(f"n{i}", LifecycleEvent.FIRST_TOKEN)
        holder.resume("tokens")
        for stream in streams:
            await read(stream)
        await world.idle()


async def test_the_queue_is_first_come_first_served() -> None:
    async with harness(FakeWorker("m", "mixed", num_credits=1)) as world:
        (fake,) = world.fakes
        for stream in [world.submit([i], 2, request_id=f"n{i}") for i in range(6)]:
            await read(stream)
        assert [job.ticket.request_id for job in fake.commands("prefill")] == [f"n{i}" for i in range(6)]
        await world.idle()


async def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    async with harness(FakeWorker("m", "mixed", num_blocks=4)) as world:
        (fake,) = world.fakes
        fake.pause("tokens")
        streams = [world.submit([1] * 30, 2, request_id="a"), world.submit([2] * 40, 2, request_id="large")]
        streams += [world.submit([3], 2, request_id="small")]
        await fake.until_received("prefill")
        fake.resume("tokens")
        for stream in streams:
            await read(stream)
        assert [job.ticket.request_id for job in fake.commands("prefill")] == ["a", "large", "small"]
        await world.idle()


async def test_a_refused_request_goes_first_when_the_workers_load_has_changed() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.pause("tokens")
        running = world.submit(PROMPT, 4, request_id="running")
        await decode.until_received("accept")
        decode.script.refuse = 1
        refused = world.submit([1], 4, request_id="refused")
        await world.seen.until_event("refused", LifecycleEvent.REFUSED)
        later = world.submit([2], 4, request_id="later")
        num_heartbeats = len(decode.heartbeats)
        await decode.until(lambda: len(decode.heartbeats) > num_heartbeats + 2)
        assert len(decode.commands("reserve")) == 2  # its load is the same: no use to ask again
        decode.resume("tokens")
        for stream in (running, refused, later):
            await read(stream)
        order = [reserve.ticket.request_id for reserve in decode.commands("reserve")]
        assert order == ["running", "refused", "refused", "later"]
        assert world.dispatcher.counts.refusals == {"no_blocks": 1}
        assert refused.stats.num_attempts == 1
        assert refused.stats.queue_s is not None
        await world.idle()


async def test_another_worker_is_asked_at_once_where_one_refuses() -> None:
    prefill, one, two = FakeWorker("p", "prefill"), FakeWorker("d1", "decode"), FakeWorker("d2", "decode")
    async with harness(prefill, one, two) as world:
        await world.until_routes(2)
        for fake in (one, two):
            fake.pause("tokens")
        busy = [world.submit([i], 3) for i in range(2)]
        await one.until_received("accept")
        await two.until_received("accept")
        one.script.refuse = 1
        refused = world.submit(PROMPT, 3)
        await two.until_received("accept", 2)
        for fake in (one, two):
            fake.resume("tokens")
        for stream in (*busy, refused):
            await read(stream)
        assert refused.stats.decode_worker == "d2"
        await world.idle()


async def test_an_idle_worker_that_refuses_does_not_hold_a_request_for_ever() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.script.refuse = 1000
        with pytest.raises(UnavailableError, match="an idle worker refused: no_blocks"):
            await read(world.submit(PROMPT, timeout_s=None))
        await world.idle()


async def test_a_local_request_that_is_refused_comes_back() -> None:
    async with harness(FakeWorker("m", "mixed")) as world:
        (fake,) = world.fakes
        fake.script.refuse = 1
        assert (await read(world.submit(PROMPT, 3)))[0] == continuation(PROMPT, 3)
        await world.idle()


# ---- refused at the door


async def test_a_full_queue_turns_away_with_a_time_to_come_back() -> None:
    async with harness(dispatch=DispatchConfig(max_queue_len=2)) as world:
        for _ in range(2):
            world.submit(PROMPT)
        with pytest.raises(OverloadedError, match="2 requests wait") as caught:
            world.submit(PROMPT, request_id="one too many")
        assert caught.value.retry_after_s > 0
        assert world.seen.of("one too many") == []
        world.dispatcher.close()
        await world.idle()


async def test_what_has_room_at_once_never_counts_as_queued() -> None:
    async with harness(FakeWorker("m", "mixed", num_credits=8), dispatch=DispatchConfig(max_queue_len=1)) as world:
        streams = [world.submit([i], 3) for i in range(9)]
        with pytest.raises(OverloadedError):
            world.submit([9], 3)
        for stream in streams:
            await read(stream)
        await world.idle()


async def test_a_request_id_in_use_is_refused_and_free_again_afterwards() -> None:
    async with pair_of_workers() as (world, _, _):
        stream = world.submit(PROMPT, 3, request_id="mine")
        with pytest.raises(InvalidRequestError, match="request_id"):
            world.submit(PROMPT, 3, request_id="mine")
        await read(stream)
        await read(world.submit(PROMPT, 3, request_id="mine"))
        await world.idle()


async def test_a_prompt_that_no_worker_can_hold_is_refused_at_the_door() -> None:
    fakes = FakeWorker("p", "prefill", max_model_len=64), FakeWorker("d", "decode", max_model_len=32)
    async with harness(*fakes) as world:
        assert world.dispatcher.max_model_len == 32
        with pytest.raises(InvalidRequestError, match="under 32 tokens"):
            world.submit([1] * 32, 1)
        await read(world.submit([1] * 31, 1))
        await world.idle()


async def test_without_any_worker_a_request_is_given_up_in_time() -> None:
    async with harness(dispatch=DispatchConfig(unavailable_timeout_s=0.05)) as world:
        with pytest.raises(UnavailableError, match="no worker is connected"):
            await read(world.submit(PROMPT, timeout_s=None))
        await world.idle()


async def test_with_half_of_a_pair_the_client_is_told_what_is_there() -> None:
    async with harness(FakeWorker("p", "prefill"), dispatch=DispatchConfig(unavailable_timeout_s=0.05)) as world:
        with pytest.raises(UnavailableError, match="only p is connected"):
            await read(world.submit(PROMPT, timeout_s=None))
        await world.idle()


async def test_busy_is_not_unavailable() -> None:
    dispatch = DispatchConfig(unavailable_timeout_s=0.05)
    async with harness(FakeWorker("m", "mixed", num_credits=1), dispatch=dispatch) as world:
        (fake,) = world.fakes
        fake.pause("tokens")
        streams = [world.submit([i], 3) for i in range(3)]
        with pytest.raises(TimeoutError):
            await world.seen.until_event("r1", LifecycleEvent.FAILED, within_s=0.2)
        fake.resume("tokens")
        for i, stream in enumerate(streams):
            assert (await read(stream))[0] == continuation([i], 3)
        await world.idle()


async def test_patience_starts_anew_when_a_worker_was_there_meanwhile() -> None:
    dispatch = DispatchConfig(unavailable_timeout_s=5.0)
    async with harness(dispatch=dispatch) as world:
        world.submit([0], 3)
        waiting = world.submit([1], 3)
        entry = world.seen.entries["r1"]
        impatient = entry.unavailable_timer is not None
        fake = FakeWorker("m", "mixed", num_credits=1)
        fake.pause("tokens")
        await world.add(fake)
        await fake.until_received("prefill")
        assert (impatient, entry.unavailable_timer) == (True, None)
        fake.resume("tokens")
        await read(waiting)
        await world.idle()


async def test_a_request_too_long_for_who_is_left_blocks_nobody() -> None:
    small, large = FakeWorker("small", "mixed", max_model_len=64), FakeWorker("large", "mixed", max_model_len=512)
    async with harness(small, large) as world:
        await world.until_routes(4)
        large.pause("tokens")
        long = world.submit([1] * 100, 4)
        await large.until_received("prefill")
        await large.kill()
        await world.until_routes(1)
        assert (await read(world.submit(PROMPT, 4)))[0] == continuation(PROMPT, 4)
        replacement = FakeWorker("large", "mixed", max_model_len=512)
        await world.add(replacement)
        assert (await read(long))[0] == continuation([1] * 100, 4)
        await world.idle()


async def test_the_observer_hears_when_the_cluster_changes() -> None:
    async with harness() as world:
        before = world.seen.num_cluster_changes
        await world.add(FakeWorker("m", "mixed"))
        assert world.seen.num_cluster_changes > before
        before = world.seen.num_cluster_changes
        await read(world.submit(PROMPT, 4))
        await world.idle()
        assert world.seen.num_cluster_changes == before
