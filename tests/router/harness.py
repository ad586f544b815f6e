"""A router core over fake workers, and what the tests ask of it."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from core.events import LifecycleEvent
from core.kv_layout import WireDtype
from core.messages import TransferStats, WorkerRole
from core.request import Disaggregation, FinishReason, Request
from core.sampling import SamplingParams
from core.ticket import Ticket
from router.config import DispatchConfig, PlacementConfig, SessionConfig
from router.dispatcher import Dispatcher
from router.ledger import Entry
from router.rpc import Registration
from router.stream import RequestStream
from router.workers import Workers
from tests.router.fake_worker import WAIT_S, FakeWorker

SESSIONS = SessionConfig(
    heartbeat_interval_s=0.02,
    dead_after_s=2.0,
    reconnect_backoff_s=0.02,
    max_reconnect_backoff_s=0.05,
    pair_backoff_s=0.02,
    max_pair_backoff_s=0.1,
)


class Recorder:
    """Observes, and wakes those who wait for something to be observed."""

    def __init__(self) -> None:
        self.events: list[tuple[str, LifecycleEvent]] = []
        self.entries: dict[str, Entry] = {}
        self.gaps: list[tuple[int, float]] = []
        self.num_cluster_changes = 0
        self.raise_at: LifecycleEvent | None = None  # once
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def on_event(self, entry: Entry, event: LifecycleEvent, now_s: float) -> None:
        if event is self.raise_at:
            self.raise_at = None
            raise ZeroDivisionError("as scripted")
        self.events.append((entry.request.request_id, event))
        self.entries[entry.request.request_id] = entry
        self._wake()

    def on_tokens(self, entry: Entry, num_tokens: int, gap_s: float) -> None:
        self.gaps.append((num_tokens, gap_s))

    def on_transfer(self, entry: Entry, ticket: Ticket, transfer: TransferStats) -> None: ...

    def on_worker_failure(self, entry: Entry, incarnation: str, reason: str) -> None: ...

    def on_cluster_change(self) -> None:
        self.num_cluster_changes += 1
        self._wake()

    def of(self, request_id: str) -> list[str]:
        return [event.value for name, event in self.events if name == request_id]

    async def until(self, condition: Callable[[], bool], within_s: float = WAIT_S) -> None:
        async with asyncio.timeout(within_s):
            while not condition():
                waiter = asyncio.get_running_loop().create_future()
                self._waiters.append((condition, waiter))
                await waiter

    async def until_event(self, request_id: str, event: LifecycleEvent, *, within_s: float = WAIT_S) -> None:
        await self.until(lambda: (request_id, event) in self.events, within_s)

    def _wake(self) -> None:
        for condition, waiter in self._waiters:
            if condition() and not waiter.done():
                waiter.set_result(None)
        self._waiters = [(condition, waiter) for condition, waiter in self._waiters if not waiter.done()]


@dataclass
class Harness:
    workers: Workers
    dispatcher: Dispatcher
    seen: Recorder
    fakes: list[FakeWorker] = field(default_factory=list)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    async def add(self, *fakes: FakeWorker) -> None:
        """Start, register, and wait until each is in some route, or at least connected."""
        for fake in fakes:
            await fake.start()
            self.register(fake)
            self.fakes.append(fake)
        names = {fake.worker_id for fake in fakes}
        await self.seen.until(lambda: names <= {info.worker_id for info in self.connected()})

    def register(self, fake: FakeWorker) -> bool:
        role = WorkerRole(fake.role)
        return self.workers.register(Registration(fake.worker_id, fake.incarnation, fake.address, role))

    def connected(self) -> list[FakeWorker]:
        ids = {info.incarnation for info in self.dispatcher.info().workers if info.connected}
        return [fake for fake in self.fakes if fake.incarnation in ids]

    async def until_routes(self, count: int = 1) -> None:
        await self.seen.until(lambda: len(self.workers.routes()) == count)

    def submit(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        *,
        request_id: str | None = None,
        timeout_s: float | None = WAIT_S,
        cache_salt: str = "",
        kv_wire_dtype: WireDtype = "auto",
        priority: int = 0,
        user: str = "",
        disaggregate: Disaggregation = "prefer",
        **changes: Any,
    ) -> RequestStream:
        sampling = replace(SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=7), **changes)
        name = request_id or f"r{next(self._ids)}"
        request = Request(
            name,
            list(prompt),
            sampling,
            cache_salt=cache_salt,
            kv_wire_dtype=kv_wire_dtype,
            priority=priority,
            user=user,
            disaggregate=disaggregate,
        )
        return self.dispatcher.submit(request, timeout_s=timeout_s)

    async def idle(self) -> None:
        """Until no request is live and no worker holds anything, by the ledger and by the workers' own books.

        Looks again at every message a worker gets: heartbeats at the latest.
        """
        if connected := self.connected():
            await connected[0].until(self._nothing_is_held)
        assert self._nothing_is_held()
        self.check()
        assert [info.num_credits_used for info in self.dispatcher.info().workers if info.num_credits_used] == []

    def _nothing_is_held(self) -> bool:
        return not self.dispatcher.ledger.num_entries and not any(fake.held for fake in self.fakes)

    def check(self) -> None:
        """Books that agree, workers without complaint, no timer left of a request that ended."""
        self.dispatcher.check_integrity()
        for entry in self.seen.entries.values():
            timers = [timer for timer in (entry.deadline_timer, entry.unavailable_timer) if timer]
            assert not entry.ended or all(timer.cancelled() for timer in timers), entry.request.request_id
        for fake in self.fakes:
            assert fake.problems == [], fake.worker_id


async def read(stream: RequestStream) -> tuple[list[int], FinishReason | None]:
    """All tokens of a stream, and its end."""
    token_ids: list[int] = []
    finish = None
    async with asyncio.timeout(WAIT_S):
        async for delta in stream:
            token_ids.extend(delta.token_ids)
            finish = delta.finish_reason
    return token_ids, finish


async def read_some(stream: RequestStream, num_tokens: int) -> list[int]:
    token_ids: list[int] = []
    async with asyncio.timeout(WAIT_S):
        while len(token_ids) < num_tokens:
            token_ids.extend((await anext(stream)).token_ids)
    return token_ids


@asynccontextmanager
async def harness(
    *fakes: FakeWorker,
    dispatch: DispatchConfig | None = None,
    sessions: SessionConfig = SESSIONS,
    fingerprint: str | None = None,
    placement: PlacementConfig | None = None,
) -> AsyncIterator[Harness]:
    """Everything is stopped and checked at the end."""
    epochs = itertools.count(1)
    workers = Workers(
        sessions, router_id="router", clock=time.monotonic, fingerprint=fingerprint, next_epoch=lambda: next(epochs)
    )
    seen = Recorder()
    dispatcher = Dispatcher(
        dispatch or DispatchConfig(),
        workers=workers,
        clock=time.monotonic,
        observer=seen,
        placement=placement,
        rng=random.Random(0),
    )
    world = Harness(workers, dispatcher, seen)
    try:
        await world.add(*fakes)
        yield world
        world.check()
    finally:
        dispatcher.close()
        await workers.close()
        for fake in world.fakes:
            await fake.kill()


@asynccontextmanager
async def pair_of_workers(
    dispatch: DispatchConfig | None = None, sessions: SessionConfig = SESSIONS
) -> AsyncIterator[tuple[Harness, FakeWorker, FakeWorker]]:
    """The usual cluster: one prefill worker, one decode worker, their pair up."""
    prefill, decode = FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode")
    async with harness(prefill, decode, dispatch=dispatch, sessions=sessions) as world:
        await world.until_routes(1)
        yield world, prefill, decode
