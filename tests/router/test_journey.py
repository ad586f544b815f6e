"""A request's way through prefill and decode worker, undisturbed."""

from __future__ import annotations

import pytest

from core.request import FinishReason
from router.config import DispatchConfig, PlacementConfig
from tests.router.fake_tokens import continuation
from tests.router.fake_worker import FakeWorker
from tests.router.harness import harness, pair_of_workers, read

pytestmark = pytest.mark.anyio
PROMPT = [5, 6, 7]


async def test_tokens_and_finish_reach_the_client() -> None:
    async with pair_of_workers() as (world, _, _):
        assert await read(world.submit(PROMPT, 8)) == (continuation(PROMPT, 8), FinishReason.LENGTH)
        await world.idle()


async def test_commands_go_out_in_the_order_of_the_design() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        await read(world.submit(PROMPT, 4))
        await world.idle()
        assert prefill.kinds() == ["connect", "prefill", "release"]
        assert decode.kinds() == ["connect", "reserve", "accept"]


async def test_both_workers_are_told_the_salt() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        await read(world.submit(PROMPT, 4, cache_salt="ours"))
        [there], [here] = prefill.commands("prefill"), decode.commands("reserve")
        assert there.work.cache_salt == here.work.cache_salt == "ours"
        await world.idle()


async def test_the_ticket_says_how_kv_travels() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        await read(world.submit(PROMPT, 4, kv_wire_dtype="int8"))
        [there], [here] = prefill.commands("prefill"), decode.commands("reserve")
        assert there.ticket.kv_wire_dtype == here.ticket.kv_wire_dtype == "int8"
        await world.idle()


async def test_both_workers_are_told_what_is_left_of_the_deadline() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        await read(world.submit(PROMPT, 4, timeout_s=9.0))
        [there], [here] = prefill.commands("prefill"), decode.commands("reserve")
        assert 8.0 < there.work.timeout_s == here.work.timeout_s <= 9.0
        await read(world.submit(PROMPT, 4, timeout_s=None))
        assert not prefill.commands("prefill")[1].work.HasField("timeout_s")
        await world.idle()


async def test_prefill_is_not_sent_before_decode_has_reserved() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.pause("reserve")
        stream = world.submit(PROMPT, 4)
        await decode.until_received("reserve")
        assert prefill.commands("prefill") == []
        decode.resume("reserve")
        await prefill.until_received("prefill")
        await read(stream)
        await world.idle()


async def test_the_first_token_does_not_wait_for_the_handover() -> None:
    async with pair_of_workers() as (world, _, decode):
        decode.pause("accept")
        stream = world.submit(PROMPT, 4)
        delta = await anext(stream)
        assert list(delta.token_ids) == continuation(PROMPT, 1)
        decode.resume("accept")
        assert (await read(stream))[0] == continuation(PROMPT, 4)[1:]
        await world.idle()


async def test_prefill_keeps_its_blocks_until_decode_has_accepted() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        decode.pause("accept")
        stream = world.submit(PROMPT, 4)
        await decode.until_received("accept")
        assert len(prefill.held) == 1
        assert prefill.commands("release") == []
        decode.resume("accept")
        await prefill.until_received("release")
        await read(stream)
        await world.idle()


async def test_one_ticket_names_both_workers_and_the_pairs_epoch() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        await read(world.submit(PROMPT, 4, request_id="mine"))
        (connect,) = decode.commands("connect")
        (reserve,), (job,), (accept,) = (
            decode.commands("reserve"),
            prefill.commands("prefill"),
            decode.commands("accept"),
        )
        ticket = reserve.ticket
        assert ticket == job.ticket == accept.ticket
        assert (ticket.request_id, ticket.attempt) == ("mine", 1)
        assert (ticket.prefill_incarnation, ticket.decode_incarnation) == (prefill.incarnation, decode.incarnation)
        assert ticket.pair_epoch == connect.epoch
        await world.idle()


async def test_sampling_reaches_the_workers_as_it_is() -> None:
    async with pair_of_workers() as (world, prefill, _):
        await read(world.submit(PROMPT, 4, stop_token_ids=(60_000, 60_001)))
        (job,) = prefill.commands("prefill")
        sampling = job.work.sampling
        assert (sampling.max_tokens, sampling.seed, sampling.temperature) == (4, 7, 0.0)
        assert list(sampling.stop_token_ids) == [60_000, 60_001]
        assert job.work.num_prompt_tokens == len(PROMPT)
        await world.idle()


@pytest.mark.parametrize(("max_tokens", "stops"), [(1, False), (8, True)])
async def test_a_first_token_that_ends_the_request_needs_no_decode(max_tokens: int, stops: bool) -> None:
    async with pair_of_workers() as (world, prefill, decode):
        prefill.script.finish_after_first = stops
        expected = FinishReason.STOP if stops else FinishReason.LENGTH
        assert await read(world.submit(PROMPT, max_tokens)) == (continuation(PROMPT, 1), expected)
        await world.idle()
        assert decode.commands("accept") == []
        assert len(decode.commands("cancel")) == 1


async def test_a_mixed_worker_serves_both_halves_alone() -> None:
    mixed = FakeWorker("mixed-0", "mixed")
    async with harness(mixed) as world:
        stream = world.submit(PROMPT, 6)
        assert await read(stream) == (continuation(PROMPT, 6), FinishReason.LENGTH)
        await world.idle()
        assert mixed.kinds() == ["prefill"]
        assert (stream.stats.prefill_worker, stream.stats.decode_worker) == ("mixed-0", "mixed-0")
        assert mixed.max_held == 1


async def test_a_first_token_can_end_a_local_request() -> None:
    mixed = FakeWorker("mixed-0", "mixed")
    async with harness(mixed) as world:
        assert (await read(world.submit(PROMPT, 1)))[0] == continuation(PROMPT, 1)
        await world.idle()


async def test_mixed_pool_takes_dedicated_workers_before_a_mixed_one() -> None:
    fakes = FakeWorker("mixed-0", "mixed"), FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode")
    async with harness(*fakes, placement=PlacementConfig(policy="mixed_pool")) as world:
        await world.until_routes(4)  # three pairs, and the mixed worker alone
        stream = world.submit(PROMPT, 4)
        await read(stream)
        assert (stream.stats.prefill_worker, stream.stats.decode_worker) == ("prefill-0", "decode-0")
        await world.idle()


async def test_stats_tell_where_the_time_went() -> None:
    async with pair_of_workers() as (world, prefill, _):
        prefill.script.num_cached_tokens = 2
        stream = world.submit(PROMPT, 4)
        await read(stream)
        stats = stream.stats
        assert stats.num_cached_tokens == 2
        assert (stats.prefill_worker, stats.decode_worker, stats.num_attempts) == ("prefill-0", "decode-0", 1)
        assert (stats.kv_bytes, stats.transfer_s, stats.transfer_exposed_s) == (100, 0.5, 0.125)
        assert stats.commit_wait_s == 0.25
        stages = stats.queue_s, stats.reserve_s, stats.prefill_s, stats.first_decode_step_s
        assert all(stage is not None and stage >= 0 for stage in stages)
        assert stats.ttft_s is not None
        assert stats.e2e_s is not None
        assert 0 < stats.ttft_s < stats.e2e_s
        await world.idle()


async def test_a_short_answer_waits_for_the_figures_of_its_transfer_and_no_longer() -> None:
    async with pair_of_workers(DispatchConfig(stats_grace_s=60.0)) as (world, prefill, _):
        prefill.pause("release")
        stream = world.submit(PROMPT, 2, request_id="mine")
        deltas = [await anext(stream), await anext(stream)]
        deadline = world.seen.entries["mine"].deadline_timer
        assert deadline is not None
        assert deadline.cancelled()  # all tokens are there in time
        prefill.resume("release")
        deltas.append(await anext(stream))
        assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH]
        assert stream.stats.kv_bytes == 100
        await world.idle()


async def test_figures_that_do_not_come_hold_the_end_up_for_a_moment_only() -> None:
    async with pair_of_workers(DispatchConfig(stats_grace_s=0.05)) as (world, prefill, _):
        prefill.pause("release")
        stream = world.submit(PROMPT, 2)
        assert await read(stream) == (continuation(PROMPT, 2), FinishReason.LENGTH)
        assert stream.stats.kv_bytes is None
        prefill.resume("release")
        await world.idle()
        assert stream.stats.kv_bytes == 100


async def test_life_cycle_events_come_in_order() -> None:
    async with pair_of_workers() as (world, _, _):
        await read(world.submit(PROMPT, 4, request_id="mine"))
        assert world.seen.of("mine") == [
            "arrived",
            "placed",
            "reserved",
            "prefill_sent",
            "first_token",
            "accepted",
            "first_decode_token",
            "finished",
        ]
        assert [num_tokens for num_tokens, _ in world.seen.gaps] == [1, 1, 1]
        await world.idle()


async def test_a_reader_may_stop_early_and_the_request_counts_as_finished() -> None:
    async with pair_of_workers() as (world, _, _):
        stream = world.submit(PROMPT, 1000, request_id="mine")
        await anext(stream)
        stream.stop()
        assert await read(stream) == ([], None)
        await world.idle()
        assert world.seen.of("mine")[-1] == "finished"
        assert world.seen.entries["mine"].finish_reason is FinishReason.STOP


async def test_a_long_prompt_goes_in_parts_to_both_workers() -> None:
    async with pair_of_workers() as (world, prefill, decode):
        prompt = list(range(10_000))
        assert (await read(world.submit(prompt, 3)))[0] == continuation(prompt, 3)
        assert decode.kinds() == ["connect", "prompt_part", "prompt_part", "reserve", "accept"]
        assert prefill.kinds()[:4] == ["connect", "prompt_part", "prompt_part", "prefill"]
        assert [part.offset for part in decode.commands("prompt_part")] == [0, 4096]
        assert decode.commands("reserve")[0].work.prompt_offset == 8192
        await world.idle()
