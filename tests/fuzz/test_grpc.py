"""Every RPC under seeded protobufs: no INTERNAL, no UNKNOWN, no hang, no leak."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterable

import grpc.aio
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from penstock.v1 import admin_pb2, inference_pb2, trace_pb2, worker_pb2
from tests.fuzz.protobufs import Fuzzer
from tests.fuzz.world import World, world
from tests.router import fake_tokens

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]
CALL_S = 10.0
"""The deadline of each call: a stream of changes ends with it."""
CONCURRENCY = 8
ALLOWED = frozenset(
    (*("OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED", "UNAVAILABLE"),)
)
SERVICES = [
    service
    for module in (inference_pb2, admin_pb2, trace_pb2, worker_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    if service.full_name != "penstock.v1.Worker"  # the router calls it, and serves none
]
RPCS = [
    (f"/{service.full_name}/{method.name}", GetMessageClass(method.input_type))
    for service in SERVICES
    for method in service.methods
]


async def fuzz(the_world: World, seed: int, num_cases: int) -> Counter[tuple[str, str]]:
    """Statuses by method. Some calls are given up midway."""
    statuses: Counter[tuple[str, str]] = Counter()
    cases = iter(range(num_cases))
    async with grpc.aio.insecure_channel(the_world.app.grpc_address) as channel:

        async def caller() -> None:
            for case in cases:
                path, kind = RPCS[case % len(RPCS)]
                statuses[path, await call(channel, path, kind, seed * 1_000_003 + case)] += 1

        async with asyncio.TaskGroup() as callers:
            for _ in range(CONCURRENCY):
                callers.create_task(caller())
    return statuses


async def call(channel: grpc.aio.Channel, path: str, kind: type[Message], seed: int) -> str:
    request, draw = Fuzzer(seed).request(kind), random.Random(seed)
    # Read as a stream, a unary answer is a stream of one.
    streaming = channel.unary_stream(path, request_serializer=bytes, response_deserializer=bytes)
    timeout_s = draw.choice((0.001, 0.05, 0.2)) if path.endswith("WatchCluster") or draw.random() < 0.1 else CALL_S
    answer = streaming(request, timeout=timeout_s)
    give_up_after = draw.randrange(1, 4) if draw.random() < 0.15 else None
    num_read = 0
    try:
        async for _ in answer:
            num_read += 1
            if num_read == give_up_after:
                answer.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code().name
    except asyncio.CancelledError:
        return "CANCELLED"
    return (await answer.code()).name


def bad(statuses: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(path, status) for path, status in statuses if status not in ALLOWED]


async def run(monkeypatch: pytest.MonkeyPatch, seed: int, num_cases: int) -> Counter[tuple[str, str]]:
    async with world(lambda size: monkeypatch.setattr(fake_tokens, "VOCAB_SIZE", size)) as the_world:
        statuses = await fuzz(the_world, seed, num_cases)
        await the_world.until_nothing_is_left()
    assert bad(statuses) == []
    assert {path for path, _ in statuses} == {path for path, _ in RPCS}
    return statuses


async def test_a_few_seeded_messages_break_no_rpc(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = await run(monkeypatch, seed=1, num_cases=300)
    assert ("/penstock.v1.Inference/Generate", "OK") in statuses
    assert ("/penstock.v1.Inference/GenerateBatch", "INVALID_ARGUMENT") in statuses


@pytest.mark.fuzz
async def test_many_seeded_messages_break_no_rpc(monkeypatch: pytest.MonkeyPatch) -> None:
    seed, num_cases = (
        int(os.environ.get("PENSTOCK_FUZZ_SEED", "1")),
        int(os.environ.get("PENSTOCK_FUZZ_CASES", "10000")),
    )
    statuses = await run(monkeypatch, seed, num_cases)
    print("\n".join(f"{count:6} {status:20} {path}" for (path, status), count in sorted(statuses.items())))
