"""`Worker.Session` over real gRPC: who may begin one, what goes through it, and how it ends."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.session import RouterSession, WorkerService
from core.kv_layout import KVLayout
from core.messages import (
    WIRE_VERSION,
    Cancel,
    Command,
    Drained,
    Heartbeat,
    Load,
    PairUp,
    Refused,
    Release,
    RouterHello,
    WorkerHello,
    WorkerRole,
)
from core.ticket import Ticket
from penstock.v1 import worker_pb2 as pb
from penstock.v1.worker_pb2_grpc import WorkerStub, add_WorkerServicer_to_server
from router.config import SessionConfig
from router.rpc_commands import command_to_wire
from router.rpc_events import WorkerMessage, message_from_wire
from router.session import Session

WAIT_S = 10.0
HELLO = WorkerHello(
    worker_id="w",
    incarnation="i",
    role=WorkerRole.DECODE,
    layout=KVLayout("m", "f", 1, 2, 3, 4, "float32"),
    credits=4,
    num_blocks=5,
    max_model_len=6,
    kv_address="127.0.0.1:7",
    device="cpu",
    max_pairs=8,
)
TICKET = Ticket("r", 1, "t", "p", "d", 1)


class Worker:
    """A served WorkerService that writes down what it hears."""

    def __init__(self) -> None:
        self.opened: queue.Queue[RouterSession] = queue.Queue()
        self.received: queue.Queue[tuple[RouterSession, Command]] = queue.Queue()
        self.closed: queue.Queue[RouterSession] = queue.Queue()
        self._server = grpc.server(ThreadPoolExecutor(8))
        service = WorkerService(
            HELLO, self.opened.put, lambda session, command: self.received.put((session, command)), self.closed.put
        )
        add_WorkerServicer_to_server(service, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def next_command(self, session: RouterSession) -> Command:
        sender, command = self.received.get(timeout=WAIT_S)
        assert sender is session
        return command

    def stop(self) -> None:
        assert self._server.stop(None).wait(WAIT_S)


class Router:
    """The other end of a stream, a message at a time."""

    def __init__(self, address: str) -> None:
        self._outbox: queue.SimpleQueue[pb.RouterMessage | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        self.call: Any = WorkerStub(self._channel).Session(iter(self._outbox.get, None), timeout=WAIT_S)

    def hello(self, name: str = "router", wire_version: int = WIRE_VERSION) -> None:
        hello = pb.RouterHello(router_id=name, incarnation=f"{name}-1", wire_version=wire_version)
        self._outbox.put(pb.RouterMessage(hello=hello))

    def say(self, *commands: Command) -> None:
        self.say_wire(*map(command_to_wire, commands))

    def say_wire(self, *commands: pb.Command) -> None:
        self._outbox.put(pb.RouterMessage(commands=commands))

    def read(self) -> WorkerMessage:
        return message_from_wire(next(self.call))

    def hang_up(self) -> None:
        """Say nothing more; the other direction stays open."""
        self._outbox.put(None)

    def end(self) -> grpc.StatusCode:
        """Read until the worker ends the stream; how it ended."""
        for _ in iter(lambda: next(self.call, None), None):
            pass
        code: grpc.StatusCode = self.call.code()
        return code

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError):
            next(self.call)
        return self.call.code(), self.call.details()

    def close(self) -> None:
        self._outbox.put(None)
        self.call.cancel()
        self._channel.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


Dial = Callable[[], Router]


@pytest.fixture
def dial(worker: Worker) -> Iterator[Dial]:
    with ExitStack() as stack:

        def make() -> Router:
            router = Router(worker.address)
            stack.callback(router.close)
            return router

        yield make


def open_session(worker: Worker, dial: Dial, name: str = "router") -> tuple[Router, RouterSession]:
    """Both ends of a session that has begun."""
    router = dial()
    router.hello(name)
    assert router.read().hello == HELLO
    return router, worker.opened.get(timeout=WAIT_S)


def assert_closed_once(worker: Worker, session: RouterSession) -> None:
    assert worker.closed.get(timeout=WAIT_S) is session
    worker.stop()  # waits for every handler
    assert worker.closed.empty()


# ---- who may begin


def test_both_sides_say_who_they_are(worker: Worker, dial: Dial) -> None:
    _, session = open_session(worker, dial, "north")
    assert session.router == RouterHello("north", "north-1")


def test_without_hello_there_is_no_session(worker: Worker, dial: Dial) -> None:
    router = dial()
    router.say(Heartbeat(()))
    assert router.refusal() == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the first message of a session must be hello",
    )
    assert worker.opened.empty()
    assert worker.received.empty()
    assert worker.closed.empty()


def test_silence_is_no_hello(worker: Worker, dial: Dial) -> None:
    router = dial()
    router.hang_up()
    assert router.refusal()[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert worker.opened.empty()


def test_another_wire_version_is_refused_by_name(worker: Worker, dial: Dial) -> None:
    router = dial()
    router.hello("new", wire_version=WIRE_VERSION + 1)
    assert router.refusal() == (
        grpc.StatusCode.FAILED_PRECONDITION,
        f"wire version {WIRE_VERSION + 1} of router new: this worker speaks {WIRE_VERSION}",
    )
    assert worker.opened.empty()


@pytest.mark.anyio
async def test_the_session_of_a_real_router_begins(worker: Worker) -> None:
    router = RouterHello("south", "south-1")
    session = await Session.open(worker.address, router, SessionConfig())
    try:
        assert session.hello == HELLO
        assert worker.opened.get(timeout=WAIT_S).router == router
    finally:
        await session.close()


# ---- what goes through


def test_commands_arrive_in_the_order_they_were_sent(worker: Worker, dial: Dial) -> None:
    router, session = open_session(worker, dial)
    beats = [Heartbeat((str(i),)) for i in range(30)]
    for i in range(0, 30, 3):
        router.say(*beats[i : i + 3])
    assert [worker.next_command(session) for _ in beats] == beats


def test_commands_may_come_with_the_hello(worker: Worker, dial: Dial) -> None:
    router = dial()
    router.hello()
    router.say(Cancel(TICKET, "why"))
    session = worker.opened.get(timeout=WAIT_S)
    assert worker.next_command(session) == Cancel(TICKET, "why")


def test_events_between_two_flushes_come_as_one_message(worker: Worker, dial: Dial) -> None:
    router, session = open_session(worker, dial)
    events = [Refused((name, 1), "no_room") for name in "abc"]
    for event in events:
        session.emit(event)
    session.flush(Load(num_running=2))
    assert router.read() == WorkerMessage(None, tuple(events), Load(num_running=2))


def test_a_changed_load_is_told_and_an_unchanged_one_is_not(worker: Worker, dial: Dial) -> None:
    router, session = open_session(worker, dial)
    for load in (Load(num_free_blocks=3), Load(num_free_blocks=3), Load(num_free_blocks=4)):
        session.flush(load)
    session.emit(Drained())
    session.flush(Load(num_free_blocks=4))
    assert [router.read() for _ in range(3)] == [
        WorkerMessage(None, (), Load(num_free_blocks=3)),
        WorkerMessage(None, (), Load(num_free_blocks=4)),
        WorkerMessage(None, (Drained(),), Load(num_free_blocks=4)),
    ]


def test_an_idle_worker_says_its_load_again(worker: Worker, dial: Dial) -> None:
    """A router takes a silent worker for dead."""
    router, session = open_session(worker, dial)
    session.flush(Load(num_free_blocks=3))
    assert [router.read().load for _ in range(2)] == [Load(num_free_blocks=3)] * 2


def test_sessions_do_not_hear_each_other(worker: Worker, dial: Dial) -> None:
    (north, to_north), (south, to_south) = (open_session(worker, dial, name) for name in ("north", "south"))
    to_south.emit(PairUp("p", "d", 2))
    to_south.flush(Load())
    to_north.emit(PairUp("p", "d", 1))
    to_north.flush(Load())
    assert (north.read().events, south.read().events) == ((PairUp("p", "d", 1),), (PairUp("p", "d", 2),))
    south.say(Release(TICKET))
    assert worker.next_command(to_south) == Release(TICKET)


# ---- how it ends


def test_a_router_that_goes_away_is_noticed_once(worker: Worker, dial: Dial) -> None:
    router, session = open_session(worker, dial)
    router.call.cancel()
    assert_closed_once(worker, session)


def test_a_router_that_hangs_up_is_noticed_once(worker: Worker, dial: Dial) -> None:
    router, session = open_session(worker, dial)
    router.hang_up()
    assert router.end() is grpc.StatusCode.OK
    assert_closed_once(worker, session)


def test_the_end_of_the_server_closes_sessions_once(worker: Worker, dial: Dial) -> None:
    _, session = open_session(worker, dial)
    worker.stop()
    assert_closed_once(worker, session)


def test_a_closed_session_says_what_was_flushed_before(worker: Worker, dial: Dial) -> None:
    router, session = open_session(worker, dial)
    session.emit(Drained())
    session.flush(Load())
    session.close()
    assert router.read().events == (Drained(),)
    assert router.end() is grpc.StatusCode.OK


def test_a_command_that_cannot_be_read_ends_its_session_alone(worker: Worker, dial: Dial) -> None:
    other, to_other = open_session(worker, dial, "other")
    router, session = open_session(worker, dial)
    router.say_wire(command_to_wire(Release(TICKET)), pb.Command(), command_to_wire(Heartbeat(())))
    assert router.end() is grpc.StatusCode.OK
    assert worker.next_command(session) == Release(TICKET)
    assert worker.closed.get(timeout=WAIT_S) is session
    other.say(Heartbeat(("x",)))
    assert worker.next_command(to_other) == Heartbeat(("x",))
    assert worker.received.empty()
    assert worker.closed.empty()
