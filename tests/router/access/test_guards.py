"""Both front doors with keys and certificates: real gRPC, HTTP and TLS; who has no key gets in nowhere."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.errors import ConfigError
from core.model_info import ModelInfo
from penstock import AsyncClient, AuthenticationError, OverloadedError, UnavailableError
from penstock.v1 import worker_pb2, worker_pb2_grpc
from router.access.config import SecurityConfig
from router.access.keys import add_to_file, new_key
from router.app import RouterApp
from router.config import RouterConfig
from tests.certificates import Certificate, make_certificate
from tests.router import fake_tokens
from tests.router.fake_worker import WAIT_S, FakeWorker
from tests.router.front_doors import make_tokenizer
from tests.router.harness import SESSIONS
from tests.router.test_router_app import cluster

pytestmark = pytest.mark.anyio
KEY = "sk-default-0123456789"


@asynccontextmanager
async def guarded(**security: Any) -> AsyncIterator[RouterApp]:
    tokenizer = make_tokenizer()
    model = ModelInfo("tiny", "TinyForCausalLM", "f00d", tokenizer.vocab_size, 128, (1,))
    config = RouterConfig(grpc_port=0, http_port=0, sessions=SESSIONS)
    app = RouterApp(config, model=model, tokenizer=tokenizer, security=SecurityConfig(**security))
    await app.start()
    try:
        yield app
    finally:
        await app.stop(0.0)


@asynccontextmanager
async def workers(app: RouterApp, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(fake_tokens, "VOCAB_SIZE", make_tokenizer().vocab_size)
    fakes = FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode")
    async with grpc.aio.insecure_channel(app.registry_address) as channel, cluster(channel, *fakes):
        yield


def client(app: RouterApp, **options: Any) -> AsyncClient:
    return AsyncClient(app.grpc_address, timeout_s=WAIT_S, max_retries=0, **options)


def http(app: RouterApp, key: str = "", **options: Any) -> httpx.AsyncClient:
    scheme = "https" if "verify" in options else "http"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=f"{scheme}://{app.http_address}", timeout=WAIT_S, headers=headers, **options)


BODY = {"prompt": "the pipe", "max_tokens": 2, "ignore_eos": True}


async def test_with_the_key_both_doors_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded(api_key=(KEY,)) as app, workers(app, monkeypatch):
        async with client(app, api_key=KEY) as sdk:
            assert await sdk.generate("the pipe", max_tokens=2, ignore_eos=True).text()
        async with http(app, KEY) as web:
            assert (await web.post("/v1/completions", json=BODY)).status_code == 200


@pytest.mark.parametrize("key", ["", "sk-default-012345678x"])
async def test_without_it_every_service_refuses_but_health(key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with guarded(api_key=(KEY,)) as app:
        async with client(app, api_key=key) as sdk:
            for ask in (sdk.server_info, sdk.model, lambda: sdk.request_trace("r"), sdk.flush_prefix_cache):
                with pytest.raises(AuthenticationError):
                    await ask()
            with pytest.raises(AuthenticationError):
                await sdk.generate("the pipe").text()
        async with grpc.aio.insecure_channel(app.grpc_address) as channel:
            reflection: Any = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                async for _ in reflection(iter([b""]), timeout=WAIT_S):
                    pass
            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert await health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        async with http(app, key) as web:
            for method, path in (
                *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")),
                *(("GET", path) for path in ("/v1/models", "/load", "/requests/r/trace", "/nowhere", "//v1/models")),
            ):
                answer = await web.request(method, path, json=BODY if method == "POST" else None)
                assert (path, answer.status_code) == (path, 401)
                assert answer.json()["error"]["type"] == "authentication_error"
            assert [(await web.get(path)).status_code for path in ("/metrics", "/version")] == [200, 200]
    assert KEY not in caplog.text
    assert not key or key not in caplog.text


async def test_a_key_that_is_no_admins_may_generate_but_not_administer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, record = new_key("team-a")
    add_to_file(tmp_path / "keys", record)
    async with guarded(api_keys_file=tmp_path / "keys") as app, workers(app, monkeypatch):
        async with client(app, api_key=key) as sdk:
            assert await sdk.generate("the pipe", max_tokens=2, ignore_eos=True).text()
            with pytest.raises(AuthenticationError, match="'team-a' is not one of an admin"):
                await sdk.flush_prefix_cache()


async def test_over_the_quota_both_doors_say_when_to_come_back(tmp_path: Path) -> None:
    key, record = new_key("team-a", requests_per_minute=1)
    add_to_file(tmp_path / "keys", record)
    async with guarded(api_keys_file=tmp_path / "keys") as app:
        async with http(app, key) as web:
            assert (await web.post("/tokenize", json={"prompt": "the"})).status_code == 200
            refused = await web.post("/tokenize", json={"prompt": "the"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 50 < int(refused.headers["retry-after"]) <= 60
            assert (await web.get("/v1/models")).status_code == 200
        async with client(app, api_key=key) as sdk:
            with pytest.raises(OverloadedError) as failure:
                await sdk.generate("the pipe").text()
            assert 50 < (failure.value.retry_after_s or 0) <= 60


async def test_tokens_come_off_the_quota_of_the_key_that_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for name in ("team-a", "team-b"):
        key, record = new_key(name, tokens_per_minute=20)
        add_to_file(tmp_path / "keys", record)
        keys.append(key)
    async with guarded(api_keys_file=tmp_path / "keys") as app, workers(app, monkeypatch):
        for key in keys:
            async with client(app, api_key=key) as sdk:
                await sdk.generate("the pipe", max_tokens=20, ignore_eos=True).text()
                with pytest.raises(OverloadedError, match="20 tokens per minute"):
                    await sdk.generate("the pipe").text()


async def test_nobody_cancels_the_requests_of_others_but_admins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for name, admin in (("team-a", False), ("team-b", False), ("boss", True)):
        key, record = new_key(name, admin=admin)
        add_to_file(tmp_path / "keys", record)
        keys.append(key)
    async with guarded(api_keys_file=tmp_path / "keys") as app:
        a, b, boss = (client(app, api_key=key, wait_for_ready=True) for key in keys)
        async with a, b, boss:
            waiting = [a.generate("the pipe", request_id=name) for name in ("one", "two")]
            for each in waiting:
                assert await each._call.read()  # Started: it is in the queue, for there is no worker
            assert [await b.cancel("one"), await a.cancel("one"), await boss.cancel("two")] == [False, True, True]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Certificate, Certificate]:
    folder = tmp_path_factory.mktemp("certificates")
    return make_certificate(folder, "server"), make_certificate(folder, "client")


async def test_with_a_certificate_both_doors_speak_tls_alone(
    certificates: tuple[Certificate, Certificate], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = certificates
    async with guarded(ssl_certfile=server.certfile, ssl_keyfile=server.keyfile) as app, workers(app, monkeypatch):
        async with client(app, ssl_ca_certs=server.certfile) as sdk:
            assert await sdk.generate("the pipe", max_tokens=2, ignore_eos=True).text()
        trust = ssl.create_default_context(cafile=server.certfile)
        async with http(app, verify=trust) as web:
            assert (await web.post("/v1/completions", json=BODY)).status_code == 200
        async with client(app) as sdk:
            with pytest.raises(UnavailableError):
                await sdk.server_info()
        async with http(app) as web:
            with pytest.raises(httpx.TransportError):
                await web.get("/health")
        async with grpc.aio.insecure_channel(app.registry_address) as channel:
            registry: Any = channel.unary_unary("/penstock.v1.Inference/GetServerInfo")
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await registry(b"", timeout=WAIT_S)
            assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_with_mutual_tls_clients_without_a_certificate_get_nowhere(
    certificates: tuple[Certificate, Certificate],
) -> None:
    server, mine = certificates
    files = {"ssl_certfile": server.certfile, "ssl_keyfile": server.keyfile, "ssl_ca_certs": mine.certfile}
    async with guarded(**files, ssl_cert_reqs=2) as app:
        own = {"ssl_certfile": mine.certfile, "ssl_keyfile": mine.keyfile}
        async with client(app, ssl_ca_certs=server.certfile, **own) as sdk:
            assert (await sdk.server_info()).model == "tiny"
        async with client(app, ssl_ca_certs=server.certfile) as sdk:
            with pytest.raises(UnavailableError):
                await sdk.server_info()
        trust = ssl.create_default_context(cafile=server.certfile)
        async with http(app, verify=trust) as web:
            with pytest.raises(httpx.TransportError):
                await web.get("/health")
        trust.load_cert_chain(mine.certfile, mine.keyfile)
        async with http(app, verify=trust) as web:
            assert (await web.get("/version")).status_code == 200


async def test_a_certificate_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"security\.ssl_certfile"):
        async with guarded(ssl_certfile=tmp_path / "c", ssl_keyfile=tmp_path / "c"):
            pass


async def test_workers_register_where_clients_can_not_unless_there_is_no_tls(
    certificates: tuple[Certificate, Certificate],
) -> None:
    server, _ = certificates
    async with guarded(ssl_certfile=server.certfile, ssl_keyfile=server.keyfile) as app:
        assert app.registry_address != app.grpc_address
        credentials = grpc.ssl_channel_credentials(server.certfile.read_bytes())
        async with grpc.aio.secure_channel(app.grpc_address, credentials) as channel:
            stub: Any = worker_pb2_grpc.RegistryStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await stub.Register(worker_pb2.RegisterRequest(), timeout=WAIT_S)
            assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
