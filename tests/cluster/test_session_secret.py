"""`Worker.Session` in a cluster with a secret: who does not have it gets no session, and no ticket of his counts."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster import session as worker_side
from cluster.session import RouterSession, WorkerService
from core.messages import Command, Release, RouterHello
from core.secret import Secret
from penstock.v1 import worker_pb2 as pb
from penstock.v1.worker_pb2_grpc import add_WorkerServicer_to_server
from router.access.network import WorkerNetwork
from router.config import SessionConfig
from router.rpc import SessionLostError
from router.rpc_commands import command_to_wire
from router.session import Session
from tests.cluster.test_session import HELLO, TICKET, WAIT_S, Router

OURS, OTHER = Secret(b"the cluster's own secret"), Secret(b"somebody else's secret")
ROUTER = RouterHello("router", "router-1")


class Worker:
    def __init__(self, secret: Secret | None) -> None:
        self.opened: queue.Queue[RouterSession] = queue.Queue()
        self.received: queue.Queue[Command] = queue.Queue()
        self.closed: queue.Queue[RouterSession] = queue.Queue()
        self._server = grpc.server(ThreadPoolExecutor(8))
        service = WorkerService(
            HELLO, self.opened.put, lambda _, command: self.received.put(command), self.closed.put, secret
        )
        add_WorkerServicer_to_server(service, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        assert self._server.stop(None).wait(WAIT_S)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(OURS)
    yield worker
    worker.stop()


async def open_session(address: str, secret: Secret | None) -> Session:
    return await Session.open(address, ROUTER, SessionConfig(), WorkerNetwork(secret))


def test_with_one_secret_a_session_opens_and_its_tickets_count(worker: Worker) -> None:
    async def main() -> None:
        session = await open_session(worker.address, OURS)
        assert session.hello.incarnation == HELLO.incarnation
        session.send(Release(TICKET))
        running = asyncio.create_task(session.run(lambda _: None, tuple))
        while (received := await asyncio.to_thread(worker.received.get, timeout=WAIT_S)) != Release(TICKET):
            assert received
        running.cancel()
        await session.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("workers", "routers", "message"),
    [
        (OURS, OTHER, "the worker has another secret"),
        (OURS, None, "UNAUTHENTICATED: this worker takes routers of its cluster's secret only"),
        (None, OURS, "the worker does not prove that it has the cluster's secret"),
    ],
)
def test_with_two_secrets_neither_side_takes_the_other(
    workers: Secret | None, routers: Secret | None, message: str
) -> None:
    worker = Worker(workers)
    try:
        with pytest.raises(SessionLostError, match=message):
            asyncio.run(open_session(worker.address, routers))
        assert workers is None or worker.opened.empty()
    finally:
        worker.stop()


def raw_hello(router: Router, nonce: bytes) -> pb.Challenge:
    """The challenge that a hello brings, by hand."""
    hello = pb.RouterHello(router_id="router", incarnation="router-1", wire_version=1, nonce=nonce)
    router._outbox.put(pb.RouterMessage(hello=hello))
    challenge: pb.Challenge = next(router.call).challenge
    return challenge


@pytest.mark.parametrize("echo", [True, False])
def test_a_router_that_only_repeats_what_it_heard_gets_no_session(worker: Worker, echo: bool) -> None:
    router = Router(worker.address)
    challenge = raw_hello(router, b"n" * 16)
    router._outbox.put(pb.RouterMessage(proof=challenge.proof if echo else b""))
    code, details = router.refusal()
    assert (code, details) == (grpc.StatusCode.UNAUTHENTICATED, "the router has another secret than this worker")
    assert worker.opened.empty()
    router.close()


def test_a_router_that_says_nothing_is_hung_up_on(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_side, "HANDSHAKE_TIMEOUT_S", 0.05)
    router = Router(worker.address)
    assert router.refusal()[0] is grpc.StatusCode.CANCELLED
    router.close()


@pytest.mark.parametrize("signer", [None, OURS, OTHER, OURS.derive("session", "of", "another")])
def test_a_ticket_that_this_session_has_not_signed_ends_it(worker: Worker, signer: Secret | None) -> None:
    """Unsigned, or signed by who has the secret in another session: what was heard there is of no use here."""

    async def main() -> None:
        session = await open_session(worker.address, OURS)
        wire = pb.RouterMessage(commands=[command_to_wire(Release(TICKET), signer)])
        await session._call._write(wire)
        with pytest.raises(SessionLostError):
            await asyncio.wait_for(session.run(lambda _: None, tuple), WAIT_S)
        await session.close()

    asyncio.run(main())
    assert worker.closed.get(timeout=WAIT_S)
    assert worker.received.empty()
