"""Requests find their way where not every pair has a channel, and around a pair that spoils what it carries."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.config import DispatchConfig
from tests.router.fake_worker import FakeWorker
from tests.router.harness import SESSIONS, Harness, harness, read, read_some

pytestmark = pytest.mark.anyio
PROMPT = [1, 2, 3]


def up(world: Harness) -> set[tuple[str, str]]:
    return {(pair.prefill_worker, pair.decode_worker) for pair in world.dispatcher.info().pairs if pair.up}


async def test_a_request_that_finds_no_room_gets_a_pair_that_was_not_connected() -> None:
    prefill = FakeWorker("p0", "prefill", max_pairs=1)
    full, free = (FakeWorker(name, "decode", num_credits=1) for name in ("d0", "d1"))
    async with harness(prefill, full) as world:
        await world.until_routes()
        await world.add(free)
        assert up(world) == {("p0", "d0")}
        full.pause("tokens")  # its request is in the middle of decoding: it needs no channel any more
        first = world.submit(PROMPT, 8)
        start = await read_some(first, 1)
        await prefill.until_received("release")
        second = world.submit(PROMPT, 8)
        tokens, _ = await read(second)
        assert len(tokens) == 8
        assert up(world) == {("p0", "d1")}
        assert second.stats.decode_worker == "d1"
        full.resume("tokens")
        rest, _ = await read(first)
        assert start + rest == tokens
        await world.idle()


async def test_a_pair_that_carries_kv_is_not_closed_for_another() -> None:
    prefill = FakeWorker("p0", "prefill", max_pairs=1)
    full, free = (FakeWorker(name, "decode", num_credits=1) for name in ("d0", "d1"))
    full.pause("accept")
    async with harness(prefill, full) as world:
        await world.until_routes()
        await world.add(free)
        first = world.submit(PROMPT, 8)
        await read_some(first, 1)
        second = world.submit(PROMPT, 8)
        await full.until_received("accept")
        assert up(world) == {("p0", "d0")}
        full.resume("accept")
        assert [len((await read(stream))[0]) for stream in (first, second)] == [7, 8]
        await world.idle()


async def test_a_pair_that_spoils_kv_is_left_alone_until_its_time_is_served() -> None:
    prefill, bad, good = FakeWorker("p0", "prefill"), FakeWorker("d0", "decode"), FakeWorker("d1", "decode")
    bad.script.fail, bad.script.fail_reason = {"accept": 3}, "checksum_mismatch"
    sessions = replace(SESSIONS, pair_quarantine_after=3, pair_quarantine_s=0.3)
    async with harness(prefill, bad, good, sessions=sessions, dispatch=DispatchConfig(max_attempts=2)) as world:
        await world.until_routes(2)
        while bad.script.fail["accept"]:
            tokens, _ = await read(world.submit(PROMPT, 4))
            assert len(tokens) == 4
        assert up(world) == {("p0", "d1")}
        (reason,) = {pair.reason for pair in world.dispatcher.info().pairs if not pair.up}
        assert reason == "3 transfers in a row have failed"
        await world.until_routes(2)
        await world.idle()
