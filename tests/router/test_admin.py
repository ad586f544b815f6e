"""The Admin service over fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from penstock.v1 import admin_pb2 as pb
from penstock.v1 import admin_pb2_grpc
from router.admin_service import AdminService, PolicySwitch, add_admin
from router.config import PlacementConfig
from tests.router.fake_worker import WAIT_S, FakeWorker
from tests.router.harness import Harness, harness, read

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def admin(*fakes: FakeWorker) -> AsyncIterator[tuple[Harness, Any]]:
    async with harness(*fakes) as world:
        server = grpc.aio.server()
        add_admin(AdminService(world.workers, PolicySwitch(world.dispatcher, PlacementConfig())), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield world, admin_pb2_grpc.AdminStub(channel)
        await server.stop(None)


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, WAIT_S)
    return caught.value.code(), caught.value.details() or ""


async def test_a_drained_worker_gets_nothing_more() -> None:
    first, second = FakeWorker("mixed-0", "mixed"), FakeWorker("mixed-1", "mixed")
    async with admin(first, second) as (world, stub):
        await stub.Drain(pb.DrainRequest(worker_id="mixed-0", deadline_s=5))
        assert (await first.until_received("drain")).deadline_s == 5
        for _ in range(4):
            await read(world.submit([1, 2, 3], 2))
        assert first.commands("prefill") == []
        assert len(second.commands("prefill")) == 4
        await world.idle()


async def test_drain_has_a_deadline_where_none_is_given() -> None:
    fake = FakeWorker("mixed-0", "mixed")
    async with admin(fake) as (_, stub):
        await stub.Drain(pb.DrainRequest(worker_id="mixed-0"))
        assert (await fake.until_received("drain")).deadline_s == 30


async def test_who_is_not_connected_can_not_be_drained_or_flushed() -> None:
    async with admin(FakeWorker("mixed-0", "mixed")) as (_, stub):
        for call in (
            stub.Drain(pb.DrainRequest(worker_id="nobody")),
            stub.FlushPrefixCache(pb.FlushPrefixCacheRequest(worker_id="nobody")),
        ):
            message = "worker_id: got 'nobody', must be one of 'mixed-0'"
            assert await failure(call) == (grpc.StatusCode.NOT_FOUND, message)


@pytest.mark.parametrize("deadline_s", [-1, float("nan"), float("inf"), 1e9])
async def test_a_drain_takes_no_senseless_deadline(deadline_s: float) -> None:
    async with admin(FakeWorker("mixed-0", "mixed")) as (_, stub):
        code, message = await failure(stub.Drain(pb.DrainRequest(worker_id="mixed-0", deadline_s=deadline_s)))
        assert (code, message.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "deadline_s")


async def test_every_worker_says_what_it_has_flushed() -> None:
    fakes = FakeWorker("mixed-0", "mixed"), FakeWorker("mixed-1", "mixed")
    fakes[1].script.num_cached_blocks = 7
    async with admin(*fakes) as (_, stub):
        answer = await stub.FlushPrefixCache(pb.FlushPrefixCacheRequest())
        assert {each.worker_id: each.num_blocks for each in answer.workers} == {"mixed-0": 0, "mixed-1": 7}
        answer = await stub.FlushPrefixCache(pb.FlushPrefixCacheRequest(worker_id="mixed-1"))
        assert [each.num_blocks for each in answer.workers] == [7]


async def test_another_policy_places_from_now_on() -> None:
    fakes = FakeWorker("mixed-0", "mixed"), FakeWorker("mixed-1", "mixed")
    async with admin(*fakes) as (world, stub):
        assert (await stub.SetPolicy(pb.SetPolicyRequest(policy="round_robin"))).previous == "least_loaded"
        for _ in range(4):
            await read(world.submit([1, 2, 3], 2))
        assert [len(fake.commands("prefill")) for fake in fakes] == [2, 2]
        assert (await stub.SetPolicy(pb.SetPolicyRequest(policy="least_loaded"))).previous == "round_robin"
        await world.idle()


async def test_an_unknown_policy_changes_nothing() -> None:
    async with admin(FakeWorker("mixed-0", "mixed")) as (_, stub):
        code, message = await failure(stub.SetPolicy(pb.SetPolicyRequest(policy="round_robbin")))
        assert (code, message) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "policy: got 'round_robbin', is not a policy; did you mean 'round_robin'?",
        )
        assert (await stub.SetPolicy(pb.SetPolicyRequest(policy="round_robin"))).previous == "least_loaded"


async def test_a_worker_lost_before_it_answers_is_unavailable() -> None:
    fake = FakeWorker("mixed-0", "mixed")
    async with admin(fake) as (_, stub):
        fake.pause("flush_cache")
        call = stub.FlushPrefixCache(pb.FlushPrefixCacheRequest())
        await fake.until_received("flush_cache")
        fake.drop_session()
        code, message = await failure(call)
        assert (code, "was lost" in message) == (grpc.StatusCode.UNAVAILABLE, True)
