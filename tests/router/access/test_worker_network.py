"""Registering in a cluster with a secret, or with certificates: only its own workers are heard, by its own routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from core.errors import ConfigError
from core.secret import Secret
from penstock.v1 import inference_pb2
from penstock.v1 import worker_pb2 as pb
from penstock.v1.worker_pb2_grpc import RegistryStub
from router.access.config import SecurityConfig
from router.access.network import WorkerNetwork
from router.handshake import registered_proof, registration_proof
from tests.certificates import make_certificate
from tests.router.access.test_guards import guarded
from tests.router.fake_worker import WAIT_S

pytestmark = pytest.mark.anyio
VALUE = "the cluster's own secret"
OURS = Secret(VALUE.encode())
NONCE = b"n" * 16


def registration(secret: Secret | None, **changes: Any) -> pb.RegisterRequest:
    names = {"worker_id": "w", "incarnation": "i", "address": "127.0.0.1:1"}
    proof = registration_proof(secret, "w", "i", "127.0.0.1:1", "decode", NONCE) if secret else b""
    values: dict[str, Any] = {**names, "role": inference_pb2.WORKER_ROLE_DECODE, "nonce": NONCE, "proof": proof}
    return pb.RegisterRequest(**{**values, **changes})


async def test_a_worker_with_the_secret_is_heard_and_can_tell_that_the_router_has_it() -> None:
    async with guarded(cluster_secret=VALUE) as app, grpc.aio.insecure_channel(app.registry_address) as channel:
        stub: Any = RegistryStub(channel)
        answer = await stub.Register(registration(OURS), timeout=WAIT_S)
        assert answer.proof == registered_proof(OURS, NONCE, connected=False)
        assert [info.worker_id for info in app.dispatcher.info().workers] == ["w"]


@pytest.mark.parametrize(
    ("secret", "changes"),
    [
        (None, {}),
        (Secret(b"somebody else's secret"), {}),
        (OURS, {"address": "6.6.6.6:1"}),
        (OURS, {"worker_id": "other"}),
        (OURS, {"role": inference_pb2.WORKER_ROLE_PREFILL}),
        (OURS, {"nonce": b""}),
    ],
)
async def test_a_stranger_is_not_heard(secret: Secret | None, changes: dict[str, Any]) -> None:
    async with guarded(cluster_secret=VALUE) as app, grpc.aio.insecure_channel(app.registry_address) as channel:
        stub: Any = RegistryStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Register(registration(secret, **changes), timeout=WAIT_S)
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert app.dispatcher.info().workers == ()


async def test_with_certificates_who_has_none_of_the_clusters_does_not_even_connect(tmp_path: Path) -> None:
    own, other = make_certificate(tmp_path, "penstock"), make_certificate(tmp_path, "other")
    names = ("cluster_ssl_certfile", "cluster_ssl_keyfile", "cluster_ssl_ca_certs")
    files: dict[str, Any] = dict(zip(names, (own.certfile, own.keyfile, own.certfile), strict=True))
    theirs: dict[str, Any] = dict(zip(names, (other.certfile, other.keyfile, own.certfile), strict=True))
    async with guarded(**files) as app:
        for security, heard in ((files, True), (theirs, False), ({}, False)):
            network = WorkerNetwork.of(SecurityConfig(**security))
            async with network.dial_aio(app.registry_address) as channel:
                stub: Any = RegistryStub(channel)
                if heard:
                    assert not (await stub.Register(registration(None), timeout=WAIT_S)).connected
                    continue
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await stub.Register(registration(None), timeout=WAIT_S)
                assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cluster_secret": "short"}, "cluster_secret: got 'a secret of 5 characters', must have at least 16"),
    ({"cluster_ssl_keyfile": "F"}, "cluster_ssl_certfile: got None, must be set"),
    ({"cluster_secret": VALUE, "cluster_secret_file": "F"}, "cluster_secret: got 'a secret', must be left out"),
    ({"cluster_secret_file": "F"}, "cluster_secret_file: got '.*file', must hold at least 16"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_what_can_not_be_is_refused_and_never_shown(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    (tmp_path / "file").write_text("hunter2\n")
    given: dict[str, Any] = {name: tmp_path / "file" if value == "F" else value for name, value in values.items()}
    with pytest.raises(ConfigError, match=message) as failure:
        WorkerNetwork.of(SecurityConfig(**given))
    assert VALUE not in str(failure.value)
    assert "hunter2" not in str(failure.value)
