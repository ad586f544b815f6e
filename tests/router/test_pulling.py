"""What a decode worker has of a prompt is brought to the prefill worker, where that is faster than to compute it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policies.speeds import Line
from router.pulling import pays
from tests.router.fake_tokens import continuation
from tests.router.fake_worker import FakeWorker
from tests.router.harness import Harness, harness, pair_of_workers, read
from tests.router.test_placements import tell_cached

pytestmark = pytest.mark.anyio
CONVERSATION = [1 + i % 50 for i in range(1200)]
PROMPT = [*CONVERSATION, 7, 7, 7]
NUM_CACHED = 1200 // 16 * 16


@asynccontextmanager
async def conversation() -> AsyncIterator[tuple[Harness, FakeWorker, FakeWorker]]:
    """The decode worker has what was said so far, and a first turn has brought up the pair that leads back."""
    async with pair_of_workers() as (world, prefill, decode):
        tell_cached(decode, CONVERSATION)
        await decode.until(lambda: len(world.workers.fleet.caches) == 75)
        assert (await read(world.submit(PROMPT, 4)))[0] == continuation(PROMPT, 4)
        assert not any(reserve.copy for reserve in prefill.commands("reserve"))
        await prefill.until(lambda: len(world.workers.describe_pairs()) == 2)
        await prefill.until(lambda: all(pair.up for pair in world.workers.describe_pairs()))
        for kind in world.workers.fleet.kinds.values():
            kind.prefill = Line(0.005, 1e-3, 512.0)  # the fake ones read a prompt in no time
        prefill.received.clear()
        decode.received.clear()
        yield world, prefill, decode


async def test_a_later_turn_gets_what_the_decode_worker_wrote() -> None:
    async with conversation() as (world, prefill, decode):
        assert (await read(world.submit(PROMPT, 4)))[0] == continuation(PROMPT, 4)
        (kept,), (sent,) = prefill.commands("reserve"), decode.commands("prefill")
        assert kept.copy
        assert sent.copy
        assert list(kept.work.token_ids) == PROMPT[: NUM_CACHED + 1]
        assert kept.ticket.prefill_incarnation == decode.incarnation
        assert kept.work.sampling.max_tokens == 1
        # the prompt was read when that had come
        assert prefill.kinds().index("accept") < prefill.kinds().index("prefill")
        assert world.dispatcher.counts.placements["pulled_prefix"] == 1
        await world.idle()


async def test_what_the_prefill_worker_has_as_well_is_not_brought() -> None:
    async with conversation() as (world, prefill, _):
        tell_cached(prefill, CONVERSATION)
        await prefill.until(lambda: world.workers.fleet.caches.bit(prefill.incarnation) != 0)
        await read(world.submit(PROMPT, 4))
        assert prefill.commands("reserve") == []
        await world.idle()


@pytest.mark.parametrize("changes", [{"kv_wire_dtype": "int8"}, {"cache_salt": "another"}, {"prompt_logprobs": 1}])
async def test_what_may_not_be_shared_is_not_brought(changes: dict[str, object]) -> None:
    async with conversation() as (world, prefill, _):
        await read(world.submit(PROMPT, 4, **changes))  # type: ignore[arg-type]
        assert prefill.commands("reserve") == []
        await world.idle()


@pytest.mark.parametrize("command", ["reserve", "prefill", "accept"])
async def test_what_can_not_be_brought_is_computed(command: str) -> None:
    async with conversation() as (world, prefill, decode):
        (decode if command == "prefill" else prefill).script.fail[command] = 1
        stream = world.submit(PROMPT, 4)
        assert (await read(stream))[0] == continuation(PROMPT, 4)
        assert stream.stats.num_attempts == 1
        await world.idle()


@pytest.mark.parametrize("command", ["reserve", "accept"])
async def test_what_takes_too_long_is_computed(command: str) -> None:
    async with conversation() as (world, prefill, _):
        prefill.pause(command)
        stream = world.submit(PROMPT, 4)
        assert (await read(stream))[0] == continuation(PROMPT, 4)
        assert stream.stats.num_attempts == 1
        prefill.resume(command)
        await world.idle()


async def test_a_request_that_is_cancelled_meanwhile_is_not_begun() -> None:
    async with conversation() as (world, prefill, _):
        prefill.pause("accept")
        stream = world.submit(PROMPT, 4)
        await prefill.until_received("accept")
        stream.cancel()
        prefill.resume("accept")
        await world.idle()
        assert prefill.commands("prefill") == []


async def test_no_pair_makes_room_for_one_that_leads_back() -> None:
    prefill = FakeWorker("p", "prefill", max_pairs=1)
    async with harness(prefill, FakeWorker("d", "decode")) as world:
        await world.until_routes(1)
        tell_cached(world.fakes[1], CONVERSATION)
        await world.fakes[1].until(lambda: len(world.workers.fleet.caches) == 75)
        for _ in range(2):
            assert (await read(world.submit(PROMPT, 4)))[0] == continuation(PROMPT, 4)
        assert len(world.workers.describe_pairs()) == 1
        await world.idle()


times = st.floats(1e-6, 10.0)


@given(num_gained=st.integers(0, 100_000), slope=times, link_s=times, link_slope=times)
def test_a_copy_pays_where_it_is_clearly_faster(
    num_gained: int, slope: float, link_s: float, link_slope: float
) -> None:
    prefill, link = Line(1.0, slope, 512.0), Line(link_s, link_slope, 512.0)
    if pays(num_gained, prefill, link):
        assert link_s + link_slope * num_gained < slope * num_gained
        assert pays(2 * num_gained, prefill, link)
        assert not pays(num_gained, Line(1.0, 0.0, 512.0), link)
    assert not pays(0, prefill, link)
