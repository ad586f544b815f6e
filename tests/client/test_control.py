"""The calls other than `generate`, and the client's own life."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from penstock import (
    AsyncClient,
    AttemptTrace,
    Forecast,
    ModelDescription,
    ModelNotFoundError,
    PairInfo,
    RequestCancelledError,
    RequestTrace,
    ServerInfo,
    Span,
    UnavailableError,
    WorkerInfo,
    WorkerRole,
)
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import trace_pb2
from tests.client.conftest import Connect, Sdk
from tests.client.fake_server import FakeServer, says


def test_cancel_tells_whether_there_was_something_to_cancel(sdk: Sdk) -> None:
    assert sdk.call("cancel", "req-1") is True
    assert sdk.call("cancel", "req-2") is False


def test_model_is_described(sdk: Sdk, server: FakeServer) -> None:
    server.answers.model.MergeFrom(pb.GetModelResponse(vocab_size=512, eos_token_ids=[2, 3], has_chat_template=True))
    expected = ModelDescription("tiny", "Qwen3MoeForCausalLM", 2048, 512, (2, 3), True)
    assert sdk.call("model") == sdk.call("model", "tiny") == expected


def test_unknown_model_is_not_found(sdk: Sdk) -> None:
    with pytest.raises(ModelNotFoundError, match=r"'huge'.*'tiny'"):
        sdk.call("model", "huge")


def test_a_trace_tells_stages_and_choices_of_a_request(sdk: Sdk, server: FakeServer) -> None:
    wire = trace_pb2.RequestTrace(request_id="req-1", elapsed_s=2.0, outcome="running", num_prompt_tokens=3)
    wire.spans.add(name="queue", attempt=1, worker="router", end_s=0.5)
    wire.spans.add(name="commit_wait", attempt=1, worker="d0", start_s=0.5, slack_s=0.0)
    wire.attempts.add(attempt=1, prefill_worker="p0", decode_worker="d0", reasons=["a", "b"], num_tokens=3)
    wire.attempts[0].forecast.ttft_s = 0.5
    server.answers.traces["req-1"] = wire
    spans = (Span("queue", 1, "router", 0.0, 0.5, None), Span("commit_wait", 1, "d0", 0.5, None, 0.0))
    forecast = Forecast(0.5, 0.0, 0.0, 0, 0)
    attempt = AttemptTrace(1, 0.0, "p0", "d0", ("a", "b"), 3, "", "", None, None, None, forecast=forecast)
    expected = RequestTrace("req-1", 0.0, 2.0, "running", "", 3, 0, 0.0, 0.0, (attempt,), 0, spans)
    assert sdk.call("request_trace", "req-1") == expected
    assert sdk.call("request_trace", "req-2") is None


def test_server_info_tells_workers_and_pairs(sdk: Sdk, server: FakeServer) -> None:
    server.answers.server.workers.add(
        worker_id="p0", incarnation="i1", role=pb.WORKER_ROLE_PREFILL, connected=True, num_blocks=64, device="cpu"
    )
    server.answers.server.workers.add(worker_id="x0", role=77)
    server.answers.server.pairs.add(prefill_worker="p0", decode_worker="d0", epoch=3, reason="peer lost")
    info = sdk.call("server_info")
    assert info == ServerInfo(
        version="0.1.0",
        model="tiny",
        uptime_s=1.5,
        num_queued=0,
        num_running=0,
        workers=(
            WorkerInfo("p0", "i1", WorkerRole.PREFILL, "", True, False, 0, 0, 64, 0, "cpu"),
            WorkerInfo("x0", "", WorkerRole.OTHER, "", False, False, 0, 0, 0, 0, ""),
        ),
        pairs=(PairInfo("p0", "d0", 3, False, "peer lost", ""),),
    )


def test_a_client_that_waits_for_ready_finds_a_server_that_starts_later(connect: Connect) -> None:
    early = FakeServer()
    early.stop()
    sdk = connect(early.target, wait_for_ready=True, timeout_s=20)
    generation = sdk.generate()
    late = FakeServer(port=int(early.target.rpartition(":")[2]))
    try:
        late.play(says("late"))
        assert sdk.text(generation) == "late"
    finally:
        late.stop()


def test_a_client_finds_a_server_that_came_back(connect: Connect) -> None:
    first = FakeServer()
    sdk = connect(first.target, max_retries=0)
    first.play(says("one"))
    assert sdk.text(sdk.generate()) == "one"
    first.stop()
    with pytest.raises(UnavailableError):
        sdk.text(sdk.generate())
    second = FakeServer(port=int(first.target.rpartition(":")[2]))
    try:
        second.play(says("two"))
        sdk.client._wait_for_ready = True
        assert sdk.text(sdk.generate()) == "two"
    finally:
        second.stop()


def test_a_closed_client_says_so(connect: Connect) -> None:
    sdk = connect()
    sdk.call("close")
    sdk.call("close")
    with pytest.raises(RuntimeError, match="closed"):
        sdk.generate()
    with pytest.raises(RuntimeError, match="closed"):
        sdk.call("server_info")


def test_async_client_may_be_made_before_any_loop_runs(server: FakeServer) -> None:
    client = AsyncClient(server.target)
    server.play(says("a"))

    async def use() -> str:
        async with client:
            return await client.generate("hi").text()

    assert asyncio.run(use()) == "a"


@pytest.mark.anyio
async def test_many_generations_of_one_client_do_not_mix(server: FakeServer) -> None:
    server.play(*[says(*"abcdefgh")] * 16)
    async with AsyncClient(server.target) as client:
        texts = await asyncio.gather(*[client.generate(str(n)).text() for n in range(16)])
    assert texts == ["abcdefgh"] * 16
    assert sorted(request.prompt for request in server.requests) == sorted(map(str, range(16)))


@pytest.mark.anyio
async def test_closing_the_async_client_frees_a_control_call(server: FakeServer) -> None:
    server.stop()
    client = AsyncClient(server.target, wait_for_ready=True)
    asking = asyncio.create_task(client.server_info())
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(RequestCancelledError):
        await asking


@pytest.mark.anyio
async def test_cancelling_the_task_of_a_control_call_is_no_error_of_ours(server: FakeServer) -> None:
    server.stop()
    async with AsyncClient(server.target, wait_for_ready=True) as client:
        asking = asyncio.create_task(client.server_info())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


def test_importing_the_package_loads_nothing_but_grpc_and_protobuf() -> None:
    code = "import sys, penstock; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert "grpc" in loaded
    for name in ("torch", "ray", "numpy", "core", "router", "engine", "cluster", "transformers", "fastapi"):
        assert name not in loaded
    code = "import sys, penstock; assert 'google.protobuf' in sys.modules and 'google.rpc' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
