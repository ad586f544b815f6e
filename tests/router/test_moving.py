"""What a draining worker decodes goes on with another, and the client sees nothing of that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from core.events import LifecycleEvent
from core.request import FinishReason
from penstock.v1 import worker_pb2 as pb
from router.stream import RequestStream
from tests.router.fake_tokens import continuation
from tests.router.fake_worker import FakeWorker
from tests.router.harness import Harness, harness, read, read_some

pytestmark = pytest.mark.anyio
PROMPT = [5, 6, 7]
NUM_TOKENS = 40


class Scene:
    """A request that has 5 tokens from worker `here`, which is then told to drain; `there` is the other one."""

    def __init__(self, world: Harness, prefill: FakeWorker, decodes: list[FakeWorker]) -> None:
        self.world, self.prefill, self.decodes = world, prefill, decodes
        self.streamed: list[int] = []

    async def start(self, prompt: list[int] = PROMPT) -> RequestStream:
        for decode in self.decodes:
            decode.script.steps = 4
        self.prompt = prompt
        stream = self.world.submit(prompt, NUM_TOKENS, request_id="r")
        self.streamed = await read_some(stream, 5)
        self.here = next(decode for decode in self.decodes if decode.held)
        self.there = next((decode for decode in self.decodes if decode is not self.here), self.here)
        return stream

    def drain(self) -> None:
        assert self.world.workers.drain(self.here.worker_id, 60.0)

    def let_decode(self) -> None:
        for decode in self.decodes:
            decode.script.steps = None
            decode.resume("tokens")

    async def finish(self, stream: RequestStream) -> None:
        self.let_decode()
        rest, finish = await read(stream)
        assert self.streamed + rest == continuation(self.prompt, NUM_TOKENS)
        assert finish is FinishReason.LENGTH
        await self.world.idle()


@asynccontextmanager
async def scene(num_decodes: int = 2) -> AsyncIterator[Scene]:
    prefill, decodes = FakeWorker("p", "prefill"), [FakeWorker(f"d{i}", "decode") for i in range(num_decodes)]
    async with harness(prefill, *decodes) as world:
        await world.until_routes(num_decodes)
        yield Scene(world, prefill, decodes)


async def test_a_request_goes_on_with_another_worker_without_a_gap() -> None:
    async with scene() as s:
        stream = await s.start()
        s.drain()
        handed = await s.here.until_received("prefill")
        await s.there.until_received("accept")
        assert handed.handover
        assert list(handed.work.token_ids) == PROMPT + s.streamed
        assert (handed.ticket.prefill_incarnation, handed.ticket.decode_incarnation) == (
            s.here.incarnation,
            s.there.incarnation,
        )
        await s.here.until(lambda: not s.here.held)
        await s.finish(stream)
        assert len(s.prefill.commands("prefill")) == 1
        assert not s.prefill.commands("cancel")
        assert stream.stats.num_attempts == 1
        assert (stream.stats.prefill_worker, stream.stats.decode_worker) == (s.here.worker_id, s.there.worker_id)
        assert "retried" not in s.world.seen.of("r")
        assert s.world.dispatcher.counts.placements["moved"] == 1


async def test_the_pair_is_connected_when_it_is_needed_and_shown_then() -> None:
    async with scene() as s:
        stream = await s.start()
        assert len(s.world.workers.describe_pairs()) == 2
        assert len(s.here.commands("connect")) == 1
        s.drain()
        await s.there.until_received("accept")
        assert len(s.world.workers.describe_pairs()) == 3
        assert len(s.here.commands("connect")) == 2
        await s.finish(stream)


async def test_without_another_worker_it_goes_on_where_it_is() -> None:
    async with scene(num_decodes=1) as s:
        stream = await s.start()
        s.drain()
        await s.here.until_received("drain")
        await s.finish(stream)
        assert "moved" not in s.world.seen.of("r")


async def test_a_worker_without_blocks_is_not_asked() -> None:
    async with scene() as s:
        stream = await s.start()
        s.there.num_blocks = 0
        s.there.say()
        await s.there.until(lambda: s.world.workers.fleet.workers[s.there.incarnation].reported_free_blocks == 0)
        s.drain()
        await s.here.until_received("drain")
        s.there.num_blocks = 4096
        await s.finish(stream)


async def test_where_room_is_refused_it_goes_on_where_it_is_with_what_was_drawn_meanwhile() -> None:
    async with scene() as s:
        stream = await s.start()
        s.there.pause("reserve")
        s.drain()
        await s.there.until_received("reserve")
        s.here.decode_to(12)
        await s.here.until(lambda: max(s.here.num_steps.values()) == 12)
        key = next(iter(s.there.held))
        s.there.forget(key)
        refused = pb.Refused(transfer_id=key[0], attempt=key[1], reason="no_blocks")
        s.there.num_blocks = 0
        s.there.say(pb.Event(refused=refused))
        s.streamed += await read_some(stream, 8)
        assert s.streamed == continuation(PROMPT, 13)
        assert s.here.held
        assert not s.here.commands("cancel")
        s.there.resume("reserve")
        s.there.num_blocks = 4096
        await s.finish(stream)
        assert stream.stats.num_attempts == 1
        assert s.world.seen.of("r").count("stayed") == 1


@pytest.mark.parametrize("command", ["reserve", "prefill", "accept"])
async def test_a_worker_that_is_lost_midway_costs_a_recompute_and_nothing_else(command: str) -> None:
    """The one that takes over, and the one that hands over, in each stage."""
    for loses_there in (True, False):
        async with scene() as s:
            third = FakeWorker("d9", "decode")
            stream = await s.start()
            asked = s.here if command == "prefill" else s.there
            asked.pause(command)
            s.drain()
            await asked.until_received(command)
            await s.world.add(third)
            lost = s.there if loses_there else s.here
            await lost.kill()
            await s.world.seen.until_event("r", LifecycleEvent.RETRIED)
            for worker in (s.here, s.there):
                worker.resume(command)
            await s.finish(stream)


@pytest.mark.parametrize("command", ["reserve", "prefill", "accept"])
async def test_a_request_that_is_cancelled_midway_is_held_by_nobody(command: str) -> None:
    async with scene() as s:
        stream = await s.start()
        asked = s.here if command == "prefill" else s.there
        asked.pause(command)
        s.drain()
        await asked.until_received(command)
        stream.cancel()
        await s.world.idle()
        assert not s.here.held
        assert not s.there.held


async def test_what_ends_while_room_is_sought_ends_once() -> None:
    """Its last tokens are drawn again elsewhere."""
    async with scene() as s:
        stream = await s.start()
        s.there.pause("reserve")
        s.drain()
        await s.there.until_received("reserve")
        s.here.script.steps = None
        s.here.resume("tokens")
        await s.here.until(lambda: not s.here.held)
        s.there.resume("reserve")
        await s.finish(stream)


async def test_a_failed_handover_is_computed_anew() -> None:
    async with scene() as s:
        stream = await s.start()
        s.here.script.fail["prefill"] = 1
        s.drain()
        await s.here.until_received("prefill")
        await s.finish(stream)
        assert stream.stats.num_attempts == 2


# ---- what goes ahead


LONG = [1 + i % 50 for i in range(4000)]


async def test_a_long_request_decodes_on_while_its_blocks_go_ahead_piece_by_piece() -> None:
    async with scene() as s:
        stream = await s.start(LONG)
        s.there.pause("accept")
        s.drain()
        await s.there.until_received("accept")
        s.here.decode_to(9)
        s.streamed += await read_some(stream, 5)
        s.there.resume("accept")
        await s.there.until_received("accept", 3)
        reserves = s.there.commands("reserve")
        lengths = [sum(len(part) for part in parts(s.there, reserve)) for reserve in reserves]
        assert [reserve.copy for reserve in reserves] == [True, True, False]
        assert lengths == [2048 + 1, (4000 + 5) // 16 * 16 + 1, 4000 + 10]
        assert [p.copy for p in s.here.commands("prefill")] == [True, True, False]
        await s.finish(stream)
        assert stream.stats.num_attempts == 1
        assert s.world.seen.of("r").count("moved") == 1
        assert {name for name, _ in s.world.seen.events} == {"r"}  # nobody hears of copies


def parts(worker: FakeWorker, reserve: pb.Reserve) -> list[list[int]]:
    ahead = [p.token_ids for p in worker.commands("prompt_part") if p.ticket == reserve.ticket]
    return [*ahead, list(reserve.work.token_ids)]


@pytest.mark.parametrize("command", ["reserve", "prefill", "accept"])
async def test_what_fails_to_go_ahead_goes_with_the_request(command: str) -> None:
    async with scene() as s:
        stream = await s.start(LONG)
        asked = s.here if command == "prefill" else s.there
        asked.script.fail[command] = 1
        s.drain()
        await s.there.until(lambda: any(not reserve.copy for reserve in s.there.commands("reserve")))
        await s.finish(stream)
        assert stream.stats.num_attempts == 1


@pytest.mark.parametrize("command", ["reserve", "prefill", "accept"])
async def test_a_request_that_ends_while_its_blocks_go_ahead_leaves_nothing(command: str) -> None:
    async with scene() as s:
        stream = await s.start(LONG)
        asked = s.here if command == "prefill" else s.there
        asked.pause(command)
        s.drain()
        await asked.until_received(command)
        stream.cancel()
        asked.resume(command)
        await s.world.idle()


async def test_a_worker_that_is_lost_while_blocks_go_ahead_fails_nobody_else() -> None:
    async with scene() as s:
        stream = await s.start(LONG)
        s.there.pause("accept")
        s.drain()
        await s.there.until_received("accept")
        await s.there.kill()
        await s.finish(stream)
        assert stream.stats.num_attempts == 1
