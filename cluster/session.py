"""One router's stream, as a worker sees it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import grpc

from cluster import rpc
from core.errors import PenstockError
from core.messages import WIRE_VERSION, Command, Event, Load, RouterHello, WorkerHello
from core.secret import Secret, draw_nonce
from penstock.v1 import worker_pb2, worker_pb2_grpc
from router.handshake import Handshake

if TYPE_CHECKING:
    from grpc import ServicerContext

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
"""For a router to say who it is, and prove it."""
LOAD_INTERVAL_S = 1.0
"""A router that hears nothing for longer than a few of these takes the worker for dead."""


class RouterSession:
    """Events to one router: collected by the engine thread with `emit`, sent together by `flush`."""

    def __init__(self, router: RouterHello) -> None:
        self.router = router
        self._events: list[Event] = []
        self._outbox: queue.SimpleQueue[worker_pb2.WorkerMessage | None] = queue.SimpleQueue()
        self._load = Load()

    def emit(self, event: Event) -> None:
        self._events.append(event)

    def flush(self, load: Load) -> None:
        """Send what was emitted, if anything was or the load has changed."""
        if self._events or load != self._load:
            self._load = load
            self._outbox.put(rpc.worker_message(self._events, load))
            self._events = []

    def close(self) -> None:
        self._outbox.put(None)

    def messages(self) -> Iterator[worker_pb2.WorkerMessage]:
        """What is to be sent, until `close`; the load again where nothing else came for a while."""
        while True:
            try:
                message = self._outbox.get(timeout=LOAD_INTERVAL_S)
            except queue.Empty:
                message = rpc.worker_message([], self._load)
            if message is None:
                return
            yield message


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """`Worker.Session`: hands sessions and commands to the callbacks, from threads of its own."""

    def __init__(
        self,
        hello: WorkerHello,
        opened: Callable[[RouterSession], None],
        received: Callable[[RouterSession, Command], None],
        closed: Callable[[RouterSession], None],
        secret: Secret | None = None,
    ) -> None:
        """With a `secret`, only routers that prove to have it are heard, and only tickets that they have signed."""
        self._hello, self._opened, self._received, self._closed = hello, opened, received, closed
        self._secret = secret

    def Session(  # noqa: N802 (named by the wire)
        self, requests: Iterator[worker_pb2.RouterMessage], context: ServicerContext
    ) -> Iterator[worker_pb2.WorkerMessage]:
        patience = threading.Timer(HANDSHAKE_TIMEOUT_S, context.cancel)  # who says nothing takes a thread meanwhile
        patience.daemon = True
        patience.start()
        context.add_callback(patience.cancel)
        first = next(requests, None)
        if first is None or not first.HasField("hello"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session must be hello")
        router = rpc.router_hello(first.hello)
        if router.wire_version != WIRE_VERSION:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"wire version {router.wire_version} of router {router.router_id}: this worker speaks {WIRE_VERSION}",
            )
        verifier: Secret | None = None
        if self._secret is not None:
            handshake = Handshake(self._secret, router.incarnation, self._hello.incarnation, router.nonce, draw_nonce())
            if not router.nonce:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "this worker takes routers of its cluster's secret only")
            yield rpc.challenge_message(handshake)
            second = next(requests, None)
            if second is None or not handshake.accepts_router(second.proof):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "the router has another secret than this worker")
            verifier = handshake.session_secret()
        patience.cancel()
        session = RouterSession(router)
        context.add_callback(session.close)
        self._opened(session)
        reader = threading.Thread(
            target=self._read, args=(session, requests, verifier), name="session-reader", daemon=True
        )
        reader.start()
        try:
            yield rpc.worker_hello_message(self._hello)
            yield from session.messages()
        finally:
            self._closed(session)

    def _read(
        self, session: RouterSession, requests: Iterator[worker_pb2.RouterMessage], verifier: Secret | None
    ) -> None:
        try:
            for message in requests:
                for command in message.commands:
                    self._received(session, rpc.command(command, verifier))
        except grpc.RpcError:
            pass  # the stream is over: `messages` ends through the call's callback
        except PenstockError as error:
            log.error("router %s sent what can't be read, its session ends: %s", session.router.router_id, error)
        finally:
            session.close()
