"""GenerateBatch, and the calls about tokens, models, load and changes, over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from core.errors import OverloadedError, UnavailableError
from core.messages import Load, WorkerRole
from core.request import FinishReason
from penstock.status import DETAILS_KEY, ErrorDetails, unpack_details
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import inference_pb2_grpc
from router.info import ClusterInfo, PairInfo, WorkerInfo
from tests.router.front_doors import WAIT_S, FrontDoors, front_doors, grpc_door

pytestmark = pytest.mark.anyio
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
async def world() -> AsyncIterator[tuple[FrontDoors, Any]]:
    with front_doors() as doors:
        async with grpc_door(doors) as channel:
            yield doors, inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
def doors(world: tuple[FrontDoors, Any]) -> FrontDoors:
    return world[0]


@pytest.fixture
def stub(world: tuple[FrontDoors, Any]) -> Any:
    return world[1]


def batch(*prompts: str, **fields: Any) -> pb.GenerateBatchRequest:
    return pb.GenerateBatchRequest(requests=[pb.GenerateRequest(prompt=prompt, **fields) for prompt in prompts])


async def collect(call: Any) -> list[pb.GenerateBatchResponse]:
    async with asyncio.timeout(WAIT_S):
        return [response async for response in call]


async def failure(call: Any) -> tuple[grpc.StatusCode, ErrorDetails]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (collect(call) if isinstance(call, grpc.aio.UnaryStreamCall) else asyncio.wait_for(call, WAIT_S))
    packed = dict(caught.value.trailing_metadata() or ())[DETAILS_KEY]
    assert isinstance(packed, bytes)
    return caught.value.code(), unpack_details(packed)


async def test_each_request_is_answered_under_its_index(doors: FrontDoors, stub: Any) -> None:
    responses = await collect(stub.GenerateBatch(batch("a", "the pipe")))
    for index in (0, 1):
        mine = [each.response for each in responses if each.index == index]
        assert (mine[0].WhichOneof("event"), mine[-1].WhichOneof("event")) == ("started", "finished")
        assert "".join(each.delta.text for each in mine) == "the pipe"
    counts = [each.response.started.num_prompt_tokens for each in responses if each.response.HasField("started")]
    assert counts == [1, len(doors.tokenizer.encode("the pipe"))]


async def test_a_request_that_fails_ends_alone(doors: FrontDoors, stub: Any) -> None:
    doors.dispatcher.finish = None
    call = stub.GenerateBatch(batch("a", "b"))
    first = await doors.dispatcher.until_running(1)
    second = await doors.dispatcher.until_running(2)
    first.stream.fail(UnavailableError("no worker"))
    second.push(finish=FinishReason.STOP)
    responses = await collect(call)
    (error,) = [each for each in responses if each.HasField("error")]
    assert (error.index, error.error.code, error.error.message) == (
        0,
        grpc.StatusCode.UNAVAILABLE.value[0],
        "no worker",
    )
    assert unpack_details(error.error.SerializeToString()).request_id == first.request.request_id
    assert [each.index for each in responses if each.response.HasField("finished")] == [1]


async def test_a_bad_request_is_named_and_nothing_is_queued(doors: FrontDoors, stub: Any) -> None:
    request = batch("a", "b")
    request.requests[1].sampling.temperature = -1
    code, details = await failure(stub.GenerateBatch(request))
    assert (code, details.field) == (grpc.StatusCode.INVALID_ARGUMENT, "requests[1].temperature")
    assert doors.dispatcher.running == []


async def test_a_full_queue_refuses_all_and_cancels_what_was_let_in(doors: FrontDoors, stub: Any) -> None:
    submit, doors.dispatcher.finish = doors.dispatcher.submit, None

    def submit_one(*args: Any, **kwargs: Any) -> Any:
        doors.dispatcher.refusal = OverloadedError("full", 2.5) if doors.dispatcher.running else None
        return submit(*args, **kwargs)

    doors.dispatcher.submit = submit_one  # type: ignore[method-assign]
    code, details = await failure(stub.GenerateBatch(batch("a", "b")))
    assert (code, details.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 2.5)
    assert [running.cancelled for running in doors.dispatcher.running] == [True]


async def test_a_client_that_leaves_cancels_all(doors: FrontDoors, stub: Any) -> None:
    doors.dispatcher.finish = None
    call = stub.GenerateBatch(batch("a", "b"))
    await doors.dispatcher.until_running(2)
    call.cancel()
    await doors.dispatcher.until_cancelled(2)


@pytest.mark.parametrize("num_requests", [0, 257])
async def test_a_batch_has_bounds(stub: Any, num_requests: int) -> None:
    code, details = await failure(stub.GenerateBatch(batch(*["a"] * num_requests)))
    assert (code, details.field) == (grpc.StatusCode.INVALID_ARGUMENT, "requests")


async def test_the_trace_of_the_call_goes_on_in_its_requests(doors: FrontDoors, stub: Any) -> None:
    metadata = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),)
    await collect(stub.GenerateBatch(batch("a"), metadata=metadata))
    async for _ in stub.Generate(pb.GenerateRequest(prompt="a"), metadata=metadata):
        pass
    async for _ in stub.Generate(pb.GenerateRequest(prompt="a"), metadata=(("traceparent", "nonsense"),)):
        pass
    first, second, third = (running.request.traceparent for running in doors.dispatcher.running)
    assert first.startswith(f"00-{TRACE}-")
    assert second.startswith(f"00-{TRACE}-")
    assert first != second
    assert third == ""


async def test_tokens_of_a_text_and_of_a_chat(doors: FrontDoors, stub: Any) -> None:
    answer = await stub.Tokenize(pb.TokenizeRequest(prompt="the pipe", return_token_strs=True))
    assert [*answer.token_ids] == doors.tokenizer.encode("the pipe")
    assert (answer.token_strs[0], answer.max_model_len) == ("the", 128)
    chat = pb.Messages(messages=[pb.Message(role="user", content="hi")])
    answer = await stub.Tokenize(pb.TokenizeRequest(messages=chat))
    assert [*answer.token_ids] == doors.tokenizer.encode("<|user|>user:hi</s><|user|>assistant:")
    assert not answer.token_strs


async def test_text_of_tokens(doors: FrontDoors, stub: Any) -> None:
    token_ids = doors.tokenizer.encode("<|user|>水門</s>")
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids))).text == "<|user|>水門</s>"


async def test_bad_tokens_and_models_are_named(stub: Any) -> None:
    code, details = await failure(stub.Tokenize(pb.TokenizeRequest()))
    assert (code, details.field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt")
    code, details = await failure(stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 99_999])))
    assert (code, details.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids[1]")
    code, details = await failure(stub.Tokenize(pb.TokenizeRequest(model="gpt", prompt="a")))
    assert (code, details.field) == (grpc.StatusCode.NOT_FOUND, "model")


async def test_all_models_are_listed(doors: FrontDoors, stub: Any) -> None:
    doors.dispatcher.max_model_len = 64
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.max_model_len, model.has_chat_template) == ("tiny", 64, True)


def worker(name: str, **fields: Any) -> WorkerInfo:
    known: dict[str, Any] = {"connected": True, "draining": False, "load": Load(), "num_blocks": 8, "credits": 4}
    known |= {"num_credits_used": 0, "device": "cpu", "role": WorkerRole.MIXED, "address": "a:1", "incarnation": "i"}
    return WorkerInfo(name, **{**known, **fields})


async def test_load_is_that_of_connected_workers(doors: FrontDoors, stub: Any) -> None:
    busy = Load(num_running=1, num_waiting=2, num_held=3, num_free_blocks=4, num_waiting_tokens=5, num_preemptions=6)
    workers = (worker("w0", load=busy, draining=True), worker("w1", connected=False))
    doors.dispatcher.cluster = ClusterInfo(workers, (), num_queued=7, num_running=8)
    load = await stub.GetLoad(pb.GetLoadRequest())
    assert (load.num_queued, load.num_running) == (7, 8)
    assert [*load.workers] == [
        pb.WorkerLoad(
            worker_id="w0",
            num_running=1,
            num_waiting=2,
            num_held=3,
            num_blocks=8,
            num_free_blocks=4,
            num_waiting_tokens=5,
            num_preemptions=6,
            draining=True,
        )
    ]


async def test_a_watcher_is_told_everything_then_what_changes(doors: FrontDoors, stub: Any) -> None:
    pair = PairInfo("w0", "w1", 1, up=True)
    doors.dispatcher.cluster = ClusterInfo((worker("w0"), worker("w1")), (pair,), 0, 0)
    call = stub.WatchCluster(pb.WatchClusterRequest())
    async with asyncio.timeout(WAIT_S):
        first = await call.read()
        assert [each.worker_id for each in first.workers] == ["w0", "w1"]
        assert [(each.prefill_worker, each.up) for each in first.pairs] == [("w0", True)]
        busy = (worker("w0", load=Load(num_running=5)), worker("w1", draining=True))
        doors.dispatcher.cluster = ClusterInfo(busy, (pair,), 0, 0)
        doors.watch.on_change()
        second = await call.read()
        assert [(each.worker_id, each.draining) for each in second.workers] == [("w1", True)]
        assert not second.pairs
        doors.dispatcher.cluster = ClusterInfo(busy[:1], (), 0, 0)
        doors.watch.on_change()
        third = await call.read()
        assert ([*third.gone_workers], third.gone_pairs[0].decode_worker) == (["w1"], "w1")
        doors.watch.stop()
        assert await call.read() is grpc.aio.EOF
