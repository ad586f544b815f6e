"""The router as a whole: real gRPC and HTTP in front, fake workers behind."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

import penstock
from core.errors import ConfigError, UnavailableError
from core.model_info import ModelInfo
from core.request import Request
from core.sampling import SamplingParams
from penstock import AsyncClient
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from router.app import RouterApp
from router.config import DispatchConfig, RouterConfig
from tests.router import fake_tokens, fake_worker
from tests.router.fake_tokens import continuation
from tests.router.fake_worker import WAIT_S, FakeWorker
from tests.router.front_doors import make_tokenizer
from tests.router.harness import SESSIONS

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Stub: TypeAlias = "inference_pb2_grpc.InferenceAsyncStub"


def make_app(**config: Any) -> RouterApp:
    tokenizer = make_tokenizer()
    model = ModelInfo("tiny", "TinyForCausalLM", "f00d", tokenizer.vocab_size, 128, (1,))
    ports = {"grpc_port": 0, "http_port": 0, "sessions": SESSIONS}
    return RouterApp(RouterConfig(**{**ports, **config}), model=model, tokenizer=tokenizer)


@asynccontextmanager
async def running_app(**config: Any) -> AsyncIterator[tuple[RouterApp, grpc.aio.Channel]]:
    app = make_app(**config)
    await app.start()
    try:
        async with grpc.aio.insecure_channel(app.grpc_address) as channel:
            yield app, channel
    finally:
        await asyncio.wait_for(app.stop(0.0), WAIT_S)


@asynccontextmanager
async def cluster(channel: grpc.aio.Channel, *fakes: FakeWorker) -> AsyncIterator[None]:
    """Registers workers as they do it themselves; returns when the router serves."""
    registry: worker_pb2_grpc.RegistryAsyncStub = worker_pb2_grpc.RegistryStub(channel)
    try:
        for fake in fakes:
            await fake.start()
            registration = worker_pb2.RegisterRequest(
                worker_id=fake.worker_id,
                incarnation=fake.incarnation,
                address=fake.address,
                role=fake_worker.ROLES[fake.role],
            )
            await registry.Register(registration, timeout=WAIT_S)
        await until_health(channel, SERVING)
        yield
    finally:
        for fake in fakes:
            await fake.kill()


async def until_health(channel: grpc.aio.Channel, status: int, service: str = "penstock.v1.Inference") -> list[int]:
    """All that a watcher is told, up to `status`."""
    told: list[int] = []
    call = watch_health(channel, service)
    async for reply in call:
        told.append(reply.status)
        if reply.status == status:
            break
    call.cancel()
    return told


def watch_health(channel: grpc.aio.Channel, service: str) -> Any:
    health: Any = health_pb2_grpc.HealthStub(channel)
    return health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)


async def check_health(channel: grpc.aio.Channel, service: str) -> int:
    health: Any = health_pb2_grpc.HealthStub(channel)
    status: int = (await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)).status
    return status


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeWorker, FakeWorker]:
    """A pair that draws tokens of our small vocabulary."""
    monkeypatch.setattr(fake_tokens, "VOCAB_SIZE", make_tokenizer().vocab_size)
    return FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode")


async def test_a_prompt_goes_through_both_doors_to_both_workers_and_back(
    workers: tuple[FakeWorker, FakeWorker],
) -> None:
    tokenizer = make_tokenizer()
    prompt = tokenizer.encode("the pipe")
    expected = continuation(prompt, 8)
    async with running_app() as (app, channel), cluster(channel, *workers):
        stub: Stub = inference_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(prompt="the pipe", sampling=pb.SamplingParams(max_tokens=8, ignore_eos=True))
        responses = [response async for response in stub.Generate(request, timeout=WAIT_S)]
        assert [token_id for response in responses for token_id in response.delta.token_ids] == expected
        assert "".join(response.delta.text for response in responses) == tokenizer.decode(expected)
        finished = responses[-1].finished
        assert finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert (finished.stats.prefill_worker, finished.stats.decode_worker) == ("prefill-0", "decode-0")
        async with httpx.AsyncClient(base_url=f"http://{app.http_address}", timeout=WAIT_S) as http:
            body = {"prompt": "the pipe", "max_tokens": 8, "ignore_eos": True}
            answer = (await http.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["text"] == tokenizer.decode(expected)
        app.dispatcher.check_integrity()


async def test_where_the_time_of_a_request_went_is_told_at_both_doors(workers: tuple[FakeWorker, FakeWorker]) -> None:
    async with running_app() as (app, channel), cluster(channel, *workers):
        async with AsyncClient(app.grpc_address, timeout_s=WAIT_S, max_retries=0) as client:
            generation = client.generate("the pipe", max_tokens=8, ignore_eos=True, request_id="mine")
            await generation.text()
            trace = await client.request_trace("mine")
            assert await client.request_trace("theirs") is None
        async with httpx.AsyncClient(base_url=f"http://{app.http_address}", timeout=WAIT_S) as http:
            told = (await http.get("/requests/mine/trace")).json()
            metrics = (await http.get("/metrics")).text
    assert trace is not None
    assert (trace.outcome, trace.num_output_tokens, [a.kv_bytes for a in trace.attempts]) == ("length", 8, [100])
    stages = ["queue", "reserve", "prefill", "transfer_hidden", "transfer_exposed", "commit", "commit_wait"]
    assert [span.name for span in trace.spans] == [*stages, "first_decode_step", "decode"]
    assert trace.spans[-1].end_s == trace.elapsed_s > 0
    assert trace.attempts[0].reasons == ("disaggregated", "least_loaded")
    attempt = trace.attempts[0]
    assert attempt.policy == "least_loaded"
    assert attempt.forecast is not None
    assert attempt.forecast.finish_s > attempt.forecast.ttft_s > 0
    assert attempt.first_token_s is not None
    assert attempt.placed_s < attempt.first_token_s < trace.elapsed_s
    assert told["spans"][1]["worker"] == told["attempts"][0]["decode_worker"] == "decode-0"
    pair = '{decode_worker="decode-0",prefill_worker="prefill-0"}'
    assert f"penstock_kv_transfer_bytes_total{pair} 100.0" in metrics


async def test_the_sdk_reads_what_the_router_says(workers: tuple[FakeWorker, FakeWorker]) -> None:
    tokenizer = make_tokenizer()
    async with running_app() as (app, channel), cluster(channel, *workers):
        async with AsyncClient(app.grpc_address, timeout_s=WAIT_S, max_retries=0) as client:
            generation = client.generate("the pipe", max_tokens=8, ignore_eos=True, seed=7)
            text = "".join([delta.text async for delta in generation])
            assert text == tokenizer.decode(continuation(tokenizer.encode("the pipe"), 8))
            assert (generation.seed, generation.finish_reason) == (7, "length")
            with pytest.raises(penstock.InvalidRequestError, match="top_p: got 2") as invalid:
                await client.generate("the pipe", top_p=2.0).text()
            with pytest.raises(penstock.ModelNotFoundError, match="must be one of 'tiny'"):
                await client.generate("the pipe", model="gpt").text()
    assert invalid.value.field == "top_p"


async def test_metrics_tell_of_requests_stages_and_workers(workers: tuple[FakeWorker, FakeWorker]) -> None:
    async with running_app() as (app, channel), cluster(channel, *workers):
        async with httpx.AsyncClient(base_url=f"http://{app.http_address}", timeout=WAIT_S) as http:
            body = {"prompt": "the pipe", "max_tokens": 8, "ignore_eos": True}
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            assert (await http.post("/v1/completions", json={"prompt": ""})).status_code == 400
            families = text_string_to_metric_families((await http.get("/metrics")).text)
    samples = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert samples["vllm:generation_tokens_total", "0", "tiny"] == 8
    assert samples["vllm:request_success_total", "0", "length", "tiny"] == 1
    assert samples["vllm:time_to_first_token_seconds_count", "0", "tiny"] == 1
    assert samples["vllm:inter_token_latency_seconds_count", "0", "tiny"] >= 1
    assert samples["penstock_attempts_total",] == 1
    assert samples["penstock_requests_total", "length"] == 1
    assert samples["penstock_requests_total", "invalid_argument"] == 1
    assert {samples["penstock_stage_seconds_count", stage] for stage in ("queue", "reserve", "prefill")} == {1}
    assert samples["penstock_worker_free_blocks", "decode-0"] > 0


async def test_health_follows_the_workers(workers: tuple[FakeWorker, FakeWorker]) -> None:
    async with running_app() as (app, channel):
        assert [await check_health(channel, service) for service in ("", "penstock.v1.Inference")] == [NOT_SERVING] * 2
        for service in ("penstock.v1.Admin", "penstock.v1.Registry", "penstock.v1.Traces"):
            assert await check_health(channel, service) == SERVING
        async with cluster(channel, *workers):
            assert [await check_health(channel, service) for service in ("", "penstock.v1.Inference")] == [SERVING] * 2
            async with httpx.AsyncClient(base_url=f"http://{app.http_address}", timeout=WAIT_S) as http:
                assert (await http.get("/health")).status_code == 200
            await workers[1].kill()
            assert (await until_health(channel, NOT_SERVING, ""))[-1] == NOT_SERVING


async def test_an_unknown_services_health_is_not_found() -> None:
    async with running_app() as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check_health(channel, "penstock.v1.Nothing")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services_and_describes_them() -> None:
    async with running_app() as (_, channel):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
        questions = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="penstock.v1.Inference"),
        ]
        listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(questions), timeout=WAIT_S)]
    assert {service.name for service in listed.list_services_response.service} == {
        "penstock.v1.Inference",
        "penstock.v1.Registry",
        "penstock.v1.Traces",
        "penstock.v1.Admin",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert b"GenerateRequest" in described.file_descriptor_response.file_descriptor_proto[0]


async def test_two_routers_pick_ports_of_their_own() -> None:
    async with running_app() as (one, _), running_app() as (other, _):
        addresses = {one.grpc_address, one.http_address, other.grpc_address, other.http_address}
    assert len(addresses) == 4
    assert all(address.startswith("127.0.0.1:") and not address.endswith(":0") for address in addresses)


@pytest.mark.parametrize("field", ["grpc_port", "http_port"])
async def test_a_port_that_is_taken_is_a_config_error_and_leaves_nothing_open(field: str) -> None:
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        probe.bind(("127.0.0.1", 0))
        other_port = probe.getsockname()[1]
        probe.close()
        other = "http_port" if field == "grpc_port" else "grpc_port"
        app = make_app(**{field: taken.getsockname()[1], other: other_port})
        with pytest.raises(ConfigError, match=f"router.{field}: .* can't be listened on at 127.0.0.1"):
            await app.start()
    with socket.socket() as again:
        again.bind(("127.0.0.1", other_port))


async def test_two_routers_never_share_a_port() -> None:
    async with running_app() as (app, _):
        with pytest.raises(ConfigError, match=r"router\.grpc_port"):
            await make_app(grpc_port=int(app.grpc_address.rpartition(":")[2])).start()


async def test_a_second_stop_does_nothing() -> None:
    app = make_app()
    await app.start()
    await app.stop(0.0)
    await app.stop(0.0)


async def test_stopping_lets_running_requests_end_within_the_grace(workers: tuple[FakeWorker, FakeWorker]) -> None:
    async with running_app() as (app, channel), cluster(channel, *workers):
        stub: Stub = inference_pb2_grpc.InferenceStub(channel)
        workers[1].pause("accept")
        request = pb.GenerateRequest(prompt="a", sampling=pb.SamplingParams(max_tokens=4, ignore_eos=True))
        call = stub.Generate(request, timeout=WAIT_S)
        await workers[1].until_received("accept")
        watch = watch_health(channel, "")
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(app.stop(WAIT_S))
        assert (await watch.read()).status == NOT_SERVING
        workers[1].resume("accept")
        responses = [response async for response in call]
        assert responses[-1].finished.num_output_tokens == 4
        await asyncio.wait_for(stopping, WAIT_S)


async def test_those_who_watch_the_health_do_not_hold_up_a_stop() -> None:
    async with running_app() as (app, channel):
        watch = watch_health(channel, "")
        assert (await watch.read()).status == NOT_SERVING
        begun_s = time.monotonic()
        await app.stop(WAIT_S)
        assert time.monotonic() - begun_s < WAIT_S / 2
        assert await watch.read() is grpc.aio.EOF


async def test_stopping_without_grace_ends_requests_and_frees_the_workers(
    workers: tuple[FakeWorker, FakeWorker],
) -> None:
    async with running_app() as (app, channel), cluster(channel, *workers):
        stub: Stub = inference_pb2_grpc.InferenceStub(channel)
        workers[1].pause("accept")
        call = stub.Generate(pb.GenerateRequest(prompt="a"), timeout=WAIT_S)
        await workers[1].until_received("accept")
        begun_s = time.monotonic()
        await asyncio.wait_for(app.stop(0.0), WAIT_S)
        assert time.monotonic() - begun_s < WAIT_S / 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [response async for response in call]
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert app.dispatcher.info().num_running == 0


async def test_a_client_that_goes_away_frees_both_workers(workers: tuple[FakeWorker, FakeWorker]) -> None:
    async with running_app() as (app, channel), cluster(channel, *workers):
        stub: Stub = inference_pb2_grpc.InferenceStub(channel)
        workers[1].pause("accept")
        call = stub.Generate(pb.GenerateRequest(prompt="a"), timeout=WAIT_S)
        await workers[1].until_received("accept")
        call.cancel()
        for fake in workers:
            await fake.until(lambda fake=fake: not fake.held)  # type: ignore[misc]
        app.dispatcher.check_integrity()


async def test_stopping_fails_whatever_still_waits() -> None:
    async with running_app() as (app, _):
        stream = app.dispatcher.submit(Request("first", [5], SamplingParams(max_tokens=4)), timeout_s=None)
        await app.stop(0.0)
        with pytest.raises(UnavailableError, match="shutting down"):
            await asyncio.wait_for(anext(stream), WAIT_S)


async def test_a_full_queue_is_429_and_counted() -> None:
    dispatch = DispatchConfig(max_queue_len=1)
    async with running_app(dispatch=dispatch) as (app, _):
        async with httpx.AsyncClient(base_url=f"http://{app.http_address}", timeout=WAIT_S) as http:
            app.dispatcher.submit(Request("first", [5], SamplingParams(max_tokens=4)), timeout_s=None)
            refused = await http.post("/v1/completions", json={"prompt": "b"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert b'penstock_requests_total{outcome="overloaded"} 1.0' in app.metrics.render()


def test_the_router_loads_no_torch_and_no_ray() -> None:
    code = "import sys, router.app; print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("field", ["worker_id", "incarnation", "address"])
@pytest.mark.parametrize("value", ["", "x" * 257, "a\nb"])
async def test_a_worker_that_can_not_be_is_not_registered(field: str, value: str) -> None:
    async with running_app() as (app, channel):
        registry: worker_pb2_grpc.RegistryAsyncStub = worker_pb2_grpc.RegistryStub(channel)
        fields: dict[str, Any] = {"worker_id": "w", "incarnation": "i", "address": "127.0.0.1:1", field: value}
        request = worker_pb2.RegisterRequest(role=fake_worker.ROLES["mixed"], **fields)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await registry.Register(request, timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (caught.value.details() or "").startswith(field)
        assert len(app.workers) == 0


@pytest.mark.parametrize("path", ["/penstock.v1.Registry/Register", "/penstock.v1.Traces/GetRequestTrace"])
async def test_bytes_that_are_no_message_are_answered_as_such(path: str) -> None:
    async with running_app() as (_, channel):
        ask: Any = channel.unary_unary(path)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(b"\xff\xff", timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
