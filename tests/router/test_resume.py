"""A request that a client tries again goes on from where it got to, on a server that has never heard of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from penstock.v1 import inference_pb2 as pb
from penstock.v1.inference_pb2_grpc import InferenceStub
from router.app import RouterApp
from tests.router import fake_tokens
from tests.router.fake_worker import WAIT_S, FakeWorker
from tests.router.front_doors import make_tokenizer
from tests.router.test_router_app import cluster, running_app

pytestmark = pytest.mark.anyio


@pytest.fixture
async def door(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[RouterApp, Any, FakeWorker]]:
    monkeypatch.setattr(fake_tokens, "VOCAB_SIZE", make_tokenizer().vocab_size)
    worker = FakeWorker("mixed-0", "mixed")
    async with running_app() as (app, channel), cluster(channel, worker):
        yield app, InferenceStub(channel), worker


def request(max_tokens: int = 12, **values: Any) -> pb.GenerateRequest:
    sampling = {"max_tokens": max_tokens, "ignore_eos": True, "seed": 5, **values.pop("sampling", {})}
    return pb.GenerateRequest(prompt="the pipe", request_id="r", sampling=pb.SamplingParams(**sampling), **values)


async def answer(stub: Any, wanted: pb.GenerateRequest) -> tuple[list[pb.Delta], pb.Finished]:
    responses = [each async for each in stub.Generate(wanted, timeout=WAIT_S)]
    assert responses[0].WhichOneof("event") == "started"
    return [each.delta for each in responses[1:-1]], responses[-1].finished


def tokens(deltas: list[pb.Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def text(deltas: list[pb.Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def end_of(call: Any) -> grpc.StatusCode:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("sampling", [{}, {"stop": ["\x00", "e"]}, {"skip_special_tokens": False}])
async def test_from_wherever_it_is_cut_the_rest_is_what_was_missing(
    door: tuple[RouterApp, Any, FakeWorker], sampling: dict[str, Any]
) -> None:
    app, stub, _ = door
    whole, finished = await answer(stub, request(sampling=sampling))
    for cut in range(1, len(whole) + 1):
        seen, come = tokens(whole[:cut]), text(whole[:cut])
        for shown in {come, come[:-1], ""}:  # the connection may have broken before all of its text had come
            resume = pb.Resume(token_ids=seen, num_characters=len(shown))
            rest, end = await answer(stub, request(sampling=sampling, resume=resume))
            assert seen + tokens(rest) == tokens(whole)
            assert shown + text(rest) == text(whole)
            assert (end.finish_reason, end.num_output_tokens) == (finished.finish_reason, finished.num_output_tokens)
    app.dispatcher.check_integrity()


async def test_all_that_is_missing_may_be_the_end(door: tuple[RouterApp, Any, FakeWorker]) -> None:
    _, stub, worker = door
    whole, finished = await answer(stub, request())
    num_commands = len(worker.received)
    resume = pb.Resume(token_ids=tokens(whole), num_characters=len(text(whole)))
    rest, end = await answer(stub, request(resume=resume))
    assert (rest, end.finish_reason, end.num_output_tokens) == ([], finished.finish_reason, 12)
    assert len([kind for kind, _ in worker.received[num_commands:] if kind == "prefill"]) == 0


async def test_a_retry_takes_over_from_the_call_that_still_runs(door: tuple[RouterApp, Any, FakeWorker]) -> None:
    app, stub, worker = door
    worker.script.steps = 3
    first = stub.Generate(request(), timeout=WAIT_S)
    seen: list[int] = []
    while len(seen) < 3:
        response = await first.read()
        seen += response.delta.token_ids
    worker.script.steps = None
    rest, _ = await answer(stub, request(resume=pb.Resume(token_ids=seen)))
    assert len(seen + tokens(rest)) == 12
    assert await end_of(first) is grpc.StatusCode.CANCELLED
    app.dispatcher.check_integrity()


async def test_without_saying_that_it_is_a_retry_an_id_in_use_is_refused(
    door: tuple[RouterApp, Any, FakeWorker],
) -> None:
    _, stub, worker = door
    worker.script.steps = 1
    first = stub.Generate(request(), timeout=WAIT_S)
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError, match="is in use by a request that still runs"):
        await answer(stub, request())
    first.cancel()


@pytest.mark.parametrize(
    ("resume", "sampling", "message"),
    [
        (pb.Resume(token_ids=[2**31]), {}, r"resume\.token_ids\[0\]: got 2147483648"),
        (pb.Resume(token_ids=[2] * 13), {}, r"resume\.token_ids: got '13 tokens', must be at most 12"),
    ],
)
async def test_what_can_not_have_come_is_refused(
    door: tuple[RouterApp, Any, FakeWorker], resume: pb.Resume, sampling: dict[str, Any], message: str
) -> None:
    _, stub, _ = door
    with pytest.raises(grpc.aio.AioRpcError, match=message):
        await answer(stub, request(sampling=sampling, resume=resume))


async def test_tokens_that_were_drawn_by_an_unknown_seed_can_not_be_gone_on_from(
    door: tuple[RouterApp, Any, FakeWorker],
) -> None:
    _, stub, _ = door
    wanted = request(resume=pb.Resume(token_ids=[2]))
    wanted.sampling.ClearField("seed")
    with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.seed: got None, must be that of Started"):
        await answer(stub, wanted)
