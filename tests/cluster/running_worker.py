"""A worker's loop in a thread, over a real engine and the embedded model, and a router's end of its sessions."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from cluster.session import RouterSession
from cluster.worker import FromRouter, SessionClosed, SessionOpened, Stop, Worker
from core.clock import Clock
from core.messages import (
    Accept,
    Accepted,
    AttemptFailed,
    CacheChanged,
    Command,
    Connect,
    Event,
    Load,
    Prefill,
    Prefilled,
    Release,
    Released,
    Reserve,
    Reserved,
    RouterHello,
    SequenceTokens,
    StepTokens,
    Work,
    WorkerRole,
)
from core.request import FinishReason
from core.sampling import SamplingParams
from core.ticket import AttemptKey, Ticket
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, StepResult
from engine.runner import Runner
from kv_transfer.config import TransferConfig
from kv_transfer.plane import KVPlane
from router.rpc_events import message_from_wire

WAIT_S = 20.0
MODEL = Path(__file__).resolve().parents[2] / "models" / "penstock-tiny"
CONFIG = EngineConfig(num_blocks=64, max_num_batched_tokens=64, max_num_seqs=8, num_threads=1, device="cpu")
"""1024 positions; prompts beyond 64 tokens take several steps."""
TRANSFER = TransferConfig(lease_s=120.0, silence_timeout_s=30.0, keepalive_s=0.2)
"""Nothing ends because the machine is busy."""

E = TypeVar("E")
_names = itertools.count()


def new_name() -> str:
    """A transfer id that no test had before: workers remember which attempts are over."""
    return f"transfer-{next(_names)}"


def prompt_of(num_tokens: int, first: int = 7) -> tuple[int, ...]:
    return tuple((first + 31 * i) % 3000 + 1 for i in range(num_tokens))


def work(
    prompt: Sequence[int], max_tokens: int = 8, *, offset: int = 0, salt: str | None = None, **sampling: float | int
) -> Work:
    """Greedy, unless `sampling` says otherwise. The first `offset` tokens go ahead in PromptPart.

    What others have asked is not found in the prefix cache, unless they have the same `salt`.
    """
    params = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **sampling})  # type: ignore[arg-type]
    return Work(tuple(prompt[offset:]), len(prompt), params, offset, new_name() if salt is None else salt)


class Steps(Runner):
    """The engine's runner behind a gate, which closes before a step that `stop_at` names.

    `failures` are raised instead of the next steps.
    """

    def __init__(self, inner: Runner) -> None:
        self._inner, self.mask_wait_s = inner, 0.0
        self._open = threading.Event()
        self._open.set()
        self.begun: queue.Queue[Plan] = queue.Queue()
        self.stop_at: Callable[[Plan], bool] = lambda plan: False
        self.failures: list[Exception] = []

    def prepare(self, sampling: SamplingParams) -> None:
        self._inner.prepare(sampling)

    def pause(self) -> None:
        """The next step stops before it computes anything. `begun` tells when it has got there."""
        while not self.begun.empty():
            self.begun.get()
        self._open.clear()

    def resume(self) -> None:
        self._open.set()

    def run(self, plan: Plan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        if self.stop_at(plan):
            self.stop_at = lambda plan: False
            self.pause()
        if not self._open.is_set():
            self.begun.put(plan)
            assert self._open.wait(WAIT_S)
        if self.failures:
            raise self.failures.pop(0)
        return self._inner.run(plan, on_layer)


class Running:
    """A worker, its engine, and the thread it runs in."""

    def __init__(
        self,
        incarnation: str,
        role: WorkerRole,
        *,
        clock: Clock = time.monotonic,
        config: EngineConfig = CONFIG,
        transfer: TransferConfig = TRANSFER,
    ) -> None:
        torch.set_num_threads(1)
        self.incarnation = incarnation
        engine = Engine.from_checkpoint(MODEL, config)
        self.steps = Steps(engine.runner)
        self.engine = dataclasses.replace(engine, runner=self.steps)
        self.kv = KVPlane(incarnation, engine.storage, "127.0.0.1", transfer, clock, lambda e: self.worker.post(e))
        self.worker = Worker(self.engine, self.kv, role, incarnation, clock)
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=incarnation, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.worker.run()
        except Exception as error:  # noqa: BLE001 (for the test to look at)
            self.error = error

    def wait(self) -> Exception | None:
        """Until its loop has ended; what it raised."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.error

    def close(self) -> None:
        """End it; whatever was asked of it, it must have kept its books."""
        self.steps.resume()
        self.worker.post(Stop())
        self.wait()
        self.kv.close()
        self.worker.check_integrity()


class Router:
    """A router's session with one worker, read an event at a time. Events that nobody asked for yet are kept."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._worker = running.worker
        self.session = RouterSession(RouterHello("router", "router-1"))
        self._messages = self.session.messages()
        self._events: list[Event] = []
        self.changes: list[CacheChanged] = []
        self.load: Load | None = None
        self._worker.post(SessionOpened(self.session))

    def say(self, *commands: Command) -> None:
        for command in commands:
            self._worker.post(FromRouter(self.session, command))

    def hang_up(self) -> None:
        self._worker.post(SessionClosed(self.session))

    def until(self, condition: Callable[[], bool]) -> None:
        """Read on until it holds; the worker speaks once a second at least."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"it has: {self._events}, {self.load}"
            message = message_from_wire(next(self._messages))
            self._hear(message.events)
            self.load = message.load

    def next(self, kind: type[E], key: AttemptKey | None = None) -> E:
        """The next event of that kind (about that attempt), taken out of what has come."""

        def found() -> list[Event]:
            return [e for e in self._events if isinstance(e, kind) and key in (None, getattr(e, "key", None))]

        self.until(lambda: bool(found()))
        event = found()[0]
        self._events.remove(event)
        assert isinstance(event, kind)
        return event

    def failure(self, key: AttemptKey) -> str:
        """The reason why the attempt failed."""
        return self.next(AttemptFailed, key).reason

    def answer(self) -> Event:
        """Whatever comes next."""
        self.until(lambda: bool(self._events))
        return self._events.pop(0)

    def tokens(self, key: AttemptKey) -> Iterator[SequenceTokens]:
        """Of one attempt, as steps bring them, up to the one that ends it."""
        finish: FinishReason | None = None
        while finish is None:
            sequence = next((s for s in self._sequences() if s.key == key), None)
            if sequence is None:
                failures = [e for e in self._events if isinstance(e, AttemptFailed) and e.key == key]
                assert not failures, failures
                seen = len(self._events)
                self.until(lambda seen=seen: len(self._events) > seen)  # type: ignore[misc]
                continue
            self._take(sequence)
            finish = sequence.finish
            yield sequence

    def wait_for_tokens(self, key: AttemptKey) -> None:
        next(self.tokens(key))

    def until_load(self, condition: Callable[[Load], bool]) -> None:
        self.until(lambda: self.load is not None and condition(self.load))

    def until_end(self) -> None:
        """Read what is left, until the worker has closed the session."""
        deadline = time.monotonic() + WAIT_S
        for message in self._messages:
            assert time.monotonic() < deadline
            self._hear(message_from_wire(message).events)

    def catch_up(self) -> None:
        """What was said before has been obeyed; `load` is what came of it."""
        nothing = Ticket("nothing", 1, new_name(), "", "", 0)
        self.say(Release(nothing))
        self.next(Released, nothing.key)

    def until_idle(self) -> None:
        """Nothing is held any more."""
        self.catch_up()
        num_blocks = self._running.engine.pool.num_blocks
        self.until_load(
            lambda load: (
                (load.num_running, load.num_waiting, load.num_held, load.num_free_blocks, load.num_waiting_tokens)
                == (0, 0, 0, num_blocks, 0)
            )
        )

    def events(self) -> list[Event]:
        """What has come and was not asked for."""
        return self._events

    def _hear(self, events: Sequence[Event]) -> None:
        """What is cached is told at any time, and asked for by few."""
        self.changes += [event for event in events if isinstance(event, CacheChanged)]
        self._events += [event for event in events if not isinstance(event, CacheChanged)]

    def _sequences(self) -> list[SequenceTokens]:
        return [s for event in self._events if isinstance(event, StepTokens) for s in event.sequences]

    def _take(self, sequence: SequenceTokens) -> None:
        for i, event in enumerate(self._events):
            if isinstance(event, StepTokens) and sequence in event.sequences:
                left = list(event.sequences)
                left.remove(sequence)
                self._events[i : i + 1] = [StepTokens(tuple(left))] if left else []
                return


class Duo:
    """A prefill and a decode worker whose channel is up."""

    def __init__(self, config: EngineConfig = CONFIG) -> None:
        self.prefill = Running("p", WorkerRole.PREFILL, config=config)
        self.decode = Running("d", WorkerRole.DECODE, config=config)
        self.connect = Connect("p", "d", 1, self.decode.kv.address, self.decode.engine.layout)

    def ticket(self, name: str, attempt: int = 1, epoch: int = 1) -> Ticket:
        return Ticket(f"request of {name}", attempt, name, "p", "d", epoch)

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


def begin(to_prefill: Router, to_decode: Router, ticket: Ticket, the_work: Work) -> int:
    """Reserve to Released, as a router does; the first token."""
    to_decode.say(Reserve(ticket, the_work))
    reserved = to_decode.next(Reserved, ticket.key)
    to_prefill.say(Prefill(ticket, the_work, reserved.num_skipped_tokens))
    prefilled = to_prefill.next(Prefilled, ticket.key)
    assert prefilled.record is not None
    to_decode.say(Accept(ticket, prefilled.record, prefilled.first_token_id, WAIT_S))
    to_decode.next(Accepted, ticket.key)
    to_prefill.say(Release(ticket))
    released = to_prefill.next(Released, ticket.key)
    assert released.transfer is not None
    assert released.transfer.num_bytes == prefilled.record.num_bytes
    return prefilled.first_token_id


def rest(router: Router, key: AttemptKey) -> list[int]:
    return [token_id for sequence in router.tokens(key) for token_id in sequence.token_ids]


def generate_locally(router: Router, the_work: Work, incarnation: str = "m") -> list[int]:
    """All tokens of one request on a mixed worker."""
    ticket = Ticket("request", 1, new_name(), incarnation, incarnation, 0)
    router.say(Prefill(ticket, the_work))
    prefilled = router.next(Prefilled, ticket.key)
    if prefilled.finish is not None:
        return [prefilled.first_token_id]
    return [prefilled.first_token_id, *rest(router, ticket.key)]
