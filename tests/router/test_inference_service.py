from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio
import pytest

from core.errors import OverloadedError, TransferError, UnavailableError
from core.messages import Load, WorkerRole
from core.request import FinishReason
from penstock.status import DETAILS_KEY, ErrorDetails, unpack_details
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import inference_pb2_grpc
from router.info import ClusterInfo, PairInfo, WorkerInfo
from tests.router.front_doors import END_OF_TEXT, WAIT_S, FrontDoors, front_doors, grpc_door

pytestmark = pytest.mark.anyio
Stub: TypeAlias = "inference_pb2_grpc.InferenceAsyncStub"


@pytest.fixture
async def world() -> AsyncIterator[tuple[FrontDoors, grpc.aio.Channel]]:
    with front_doors() as doors:
        async with grpc_door(doors) as channel:
            yield doors, channel


@pytest.fixture
def doors(world: tuple[FrontDoors, grpc.aio.Channel]) -> FrontDoors:
    return world[0]


@pytest.fixture
def channel(world: tuple[FrontDoors, grpc.aio.Channel]) -> grpc.aio.Channel:
    return world[1]


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Stub:
    return inference_pb2_grpc.InferenceStub(channel)


def ask(prompt: str = "the pipe", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=prompt, **fields)


async def collect(call: Any) -> list[pb.GenerateResponse]:
    async with asyncio.timeout(WAIT_S):
        return [response async for response in call]


async def failure(call: Any) -> tuple[grpc.StatusCode, str, ErrorDetails]:
    """Status, message and details of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (collect(call) if isinstance(call, grpc.aio.UnaryStreamCall) else asyncio.wait_for(call, WAIT_S))
    error = caught.value
    packed = dict(error.trailing_metadata()).get(DETAILS_KEY)
    assert isinstance(packed, bytes)
    return error.code(), error.details() or "", unpack_details(packed)


def raw(channel: grpc.aio.Channel, request: bytes, method: str = "Generate") -> Any:
    path = f"/penstock.v1.Inference/{method}"
    call: Any = channel.unary_stream(path) if method == "Generate" else channel.unary_unary(path)
    return call(request)


async def test_a_stream_is_one_started_then_deltas_then_one_finished(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.reply = "the 水門 pipe"
    sampling = pb.SamplingParams(seed=7, max_tokens=9, temperature=0, stop_token_ids=[9])
    ours = {"cache_salt": "ours", "kv_wire_dtype": "int8"}
    responses = await collect(stub.Generate(ask(request_id="mine", model="tiny", sampling=sampling, **ours)))
    started, *deltas, finished = responses
    prompt = doors.tokenizer.encode("the pipe")
    assert started.started == pb.Started(request_id="mine", model="tiny", seed=7, num_prompt_tokens=len(prompt))
    assert "".join(response.delta.text for response in deltas) == "the 水門 pipe"
    token_ids = [token_id for response in deltas for token_id in response.delta.token_ids]
    assert token_ids == doors.tokenizer.encode("the 水門 pipe")
    assert finished.finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert finished.finished.num_prompt_tokens == len(prompt)
    assert finished.finished.num_output_tokens == len(token_ids)
    submitted = doors.dispatcher.running[0].request
    assert (submitted.sampling.max_tokens, submitted.sampling.temperature) == (9, 0.0)
    assert submitted.sampling.stop_token_ids == (9, END_OF_TEXT)
    assert (submitted.cache_salt, submitted.kv_wire_dtype) == ("ours", "int8")


async def test_stages_that_did_not_happen_stay_unset_in_the_stats(stub: Stub) -> None:
    stats = (await collect(stub.Generate(ask())))[-1].finished.stats
    assert (stats.prefill_worker, stats.decode_worker, stats.num_attempts) == ("prefill-0", "decode-0", 1)
    assert (stats.queue_s, stats.ttft_s, stats.e2e_s, stats.kv_bytes) == (0.25, 0.5, 1.0, 512)
    assert [name for name in ("reserve_s", "commit_wait_s", "transfer_s") if stats.HasField(name)] == []


async def test_an_unset_field_is_not_a_zero(doors: FrontDoors, stub: Stub) -> None:
    await collect(stub.Generate(ask()))
    sampling = doors.dispatcher.running[0].request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens > 100) == (1.0, 1.0, True)


async def test_token_ids_and_messages_are_prompts_too(doors: FrontDoors, stub: Stub) -> None:
    await collect(stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]))))
    messages = pb.Messages(messages=[pb.Message(role="user", content="hi")])
    await collect(stub.Generate(pb.GenerateRequest(messages=messages)))
    first, second = [running.request.prompt_token_ids for running in doors.dispatcher.running]
    assert first == [5, 6]
    assert second == doors.tokenizer.encode("<|user|>user:hi</s><|user|>assistant:")


async def test_a_stop_string_finishes_by_stop(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.finish = None
    responses = await collect(stub.Generate(ask(sampling=pb.SamplingParams(stop=[" p"]))))
    assert "".join(response.delta.text for response in responses) == "the"
    assert responses[-1].finished.finish_reason == pb.FINISH_REASON_STOP
    assert doors.dispatcher.running[0].stopped


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (ask(""), "prompt"),
        (ask(sampling=pb.SamplingParams(temperature=-1)), "temperature"),
        (ask(sampling=pb.SamplingParams(top_p=0)), "top_p"),
        (ask(sampling=pb.SamplingParams(max_tokens=4000)), "max_tokens"),
        (ask(sampling=pb.SamplingParams(stop=[""])), "stop[0]"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), "token_ids[0]"),
        (ask(timeout_s=-1), "timeout_s"),
    ],
)
async def test_a_bad_request_is_invalid_argument_with_its_field(
    doors: FrontDoors, stub: Stub, request_: pb.GenerateRequest, field: str
) -> None:
    code, message, details = await failure(stub.Generate(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.field == field
    assert message.startswith(f"{field}: got ")
    assert doors.dispatcher.running == []


@pytest.mark.parametrize(
    ("suffix", "field"),
    [
        (b"\xa0\x06\x01", "100"),
        (b"\x32\x03\xa0\x06\x01", "sampling.100"),
        (b"\x40\x00", "8"),  # field 8 is not in the schema
        (b"\x38\x01", "7"),  # timeout_s as an integer: the wrong type
        (b"\x2a\x05\x0a\x03\xa0\x06\x01", "messages.messages[0].100"),
    ],
)
async def test_a_field_that_is_not_in_the_schema_is_named_by_number(
    doors: FrontDoors, channel: grpc.aio.Channel, suffix: bytes, field: str
) -> None:
    code, message, details = await failure(raw(channel, ask().SerializeToString() + suffix))
    assert (code, details.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert f"has no field {field.rpartition('.')[2]}" in message
    assert doors.dispatcher.running == []


@pytest.mark.parametrize("request_", [b"\x1a\x02\xff\xfe", b"\x1a\x7fshort", b"\x0a\x01\xc3"])
@pytest.mark.parametrize("method", ["Generate", "Cancel", "GetModel"])
async def test_bytes_that_are_no_message_are_invalid_argument(
    channel: grpc.aio.Channel, request_: bytes, method: str
) -> None:
    code, message, details = await failure(raw(channel, request_, method))
    if method == "Generate" or request_.startswith(b"\x0a"):
        assert "with all strings in UTF-8" in message
    assert (code, details.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")


async def test_an_unknown_model_is_not_found(stub: Stub) -> None:
    code, message, details = await failure(stub.Generate(ask(model="gpt")))
    assert (code, details.field) == (grpc.StatusCode.NOT_FOUND, "model")
    assert message == "model: got 'gpt', must be one of 'tiny'"
    assert (await failure(stub.GetModel(pb.GetModelRequest(model="gpt"))))[0] is grpc.StatusCode.NOT_FOUND


async def test_a_full_queue_is_resource_exhausted_with_a_time_to_retry(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.refusal = OverloadedError("the queue is full", retry_after_s=2.5)
    code, message, details = await failure(stub.Generate(ask(request_id="mine")))
    assert (code, message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    assert (details.retry_after_s, details.request_id) == (2.5, "mine")


async def test_a_failure_midway_is_a_status_after_the_text(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.error = TransferError("checksum_mismatch", "the KV cache did not arrive whole")
    call = stub.Generate(ask())
    async with asyncio.timeout(WAIT_S):
        _, delta = [await call.read() for _ in range(2)]
    assert isinstance(delta, pb.GenerateResponse)
    assert delta.delta.text == "the pipe"
    code, _, details = await failure(call.read())
    assert (code, details.reason) == (grpc.StatusCode.INTERNAL, "checksum_mismatch")


async def test_no_worker_is_unavailable(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.error = UnavailableError("no worker is connected")
    doors.dispatcher.reply = ""
    assert (await failure(stub.Generate(ask())))[:2] == (grpc.StatusCode.UNAVAILABLE, "no worker is connected")


async def test_a_bug_is_told_to_the_log_and_not_to_the_client(
    doors: FrontDoors, stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(doors.dispatcher, "submit", broken)
    assert (await failure(stub.Generate(ask())))[:2] == (grpc.StatusCode.INTERNAL, "internal error of the server")
    assert "ZeroDivisionError: secret" in caplog.text


async def test_a_client_that_goes_away_cancels_its_request(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.finish = None
    call = stub.Generate(ask())
    async with asyncio.timeout(WAIT_S):
        await call.read()
    call.cancel()
    await doors.dispatcher.until_cancelled()


async def test_a_client_that_goes_away_before_the_first_token_cancels_its_request(
    doors: FrontDoors, stub: Stub
) -> None:
    doors.dispatcher.reply, doors.dispatcher.finish = "", None
    call = stub.Generate(ask())
    async with asyncio.timeout(WAIT_S):
        await call.read()
    call.cancel()
    await doors.dispatcher.until_cancelled()


async def test_a_request_that_ended_is_not_cancelled(doors: FrontDoors, stub: Stub) -> None:
    await collect(stub.Generate(ask()))
    assert not doors.dispatcher.running[0].cancelled


async def test_cancel_ends_the_stream_and_says_whether_there_was_one(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.finish = None
    call = stub.Generate(ask(request_id="mine"))
    await doors.dispatcher.until_running()
    assert (await stub.Cancel(pb.CancelRequest(request_id="mine"), timeout=WAIT_S)).found
    assert (await failure(call))[0] is grpc.StatusCode.CANCELLED
    assert not (await stub.Cancel(pb.CancelRequest(request_id="mine"), timeout=WAIT_S)).found


async def test_cancel_without_an_id_is_refused(stub: Stub) -> None:
    assert (await failure(stub.Cancel(pb.CancelRequest())))[2].field == "request_id"


@pytest.mark.parametrize(
    ("call_s", "request_s", "least_s", "most_s"), [(30, None, 20, 31), (30, 5, 5, 5), (5, 30, 1, 6), (None, 7, 7, 7)]
)
async def test_the_nearer_deadline_holds(
    doors: FrontDoors, stub: Stub, call_s: float | None, request_s: float | None, least_s: float, most_s: float
) -> None:
    request = ask() if request_s is None else ask(timeout_s=request_s)
    await collect(stub.Generate(request, timeout=call_s))
    timeout_s = doors.dispatcher.running[0].timeout_s
    assert timeout_s is not None
    assert least_s <= timeout_s <= most_s


async def test_no_deadline_is_no_deadline(doors: FrontDoors, stub: Stub) -> None:
    await collect(stub.Generate(ask()))
    assert doors.dispatcher.running[0].timeout_s is None


async def test_a_call_whose_deadline_passes_cancels_its_request(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.finish = None
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(stub.Generate(ask(), timeout=0.2))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await doors.dispatcher.until_cancelled()


async def test_the_model_is_described(doors: FrontDoors, stub: Stub) -> None:
    expected = pb.GetModelResponse(
        name="tiny",
        architecture="TinyForCausalLM",
        max_model_len=128,
        vocab_size=doors.model.vocab_size,
        eos_token_ids=[END_OF_TEXT],
        has_chat_template=True,
    )
    assert await stub.GetModel(pb.GetModelRequest(), timeout=WAIT_S) == expected
    doors.dispatcher.max_model_len = 64
    assert (await stub.GetModel(pb.GetModelRequest(), timeout=WAIT_S)).max_model_len == 64


async def test_the_server_tells_of_its_workers_and_pairs(doors: FrontDoors, stub: Stub) -> None:
    load = Load(num_running=2, num_waiting=1, num_free_blocks=90)
    worker = WorkerInfo("p0", "p0-1", WorkerRole.PREFILL, "h:1", True, True, load, 100, 8, 3, "cpu")
    pair = PairInfo("p0", "d0", 4, up=True, transport="shm")
    doors.dispatcher.cluster = ClusterInfo((worker,), (pair,), num_queued=6, num_running=7)
    doors.clock.advance(2.5)
    info = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT_S)
    assert (info.version, info.model, info.uptime_s, info.num_queued, info.num_running) == ("1.2.3", "tiny", 2.5, 6, 7)
    assert info.workers[0] == pb.WorkerInfo(
        worker_id="p0",
        incarnation="p0-1",
        role=pb.WORKER_ROLE_PREFILL,
        address="h:1",
        connected=True,
        draining=True,
        num_running=2,
        num_waiting=1,
        num_blocks=100,
        num_free_blocks=90,
        device="cpu",
    )
    assert info.pairs[0] == pb.PairInfo(prefill_worker="p0", decode_worker="d0", epoch=4, up=True, transport="shm")


async def test_many_streams_at_once_keep_apart(doors: FrontDoors, stub: Stub) -> None:
    doors.dispatcher.finish = FinishReason.STOP
    calls = [stub.Generate(ask(request_id=f"r{i}")) for i in range(50)]
    answers = await asyncio.gather(*(collect(call) for call in calls))
    assert [answer[0].started.request_id for answer in answers] == [f"r{i}" for i in range(50)]
    assert {"".join(response.delta.text for response in answer) for answer in answers} == {"the pipe"}


async def test_every_method_of_the_service_is_served(channel: grpc.aio.Channel) -> None:
    unreadable = b"\xff"
    for method in pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name:
        assert (await failure(raw(channel, unreadable, method)))[0] is grpc.StatusCode.INVALID_ARGUMENT
