"""Sends every request when it is due, whatever became of those before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.serve.records import Record
from benchmarks.serve.workload import Plan

Clock = Callable[[], float]
TIMER_S = 0.0015
"""How late the loop's timers may be; the rest of a wait is spent turning the loop."""
PROBE_S = 0.02


class RequestError(Exception):
    """One request failed."""


@dataclass(slots=True)
class Answer:
    """What came, also before a failure: when each message with tokens did. Counts are None where nobody tells them."""

    tokens_s: list[float] = field(default_factory=list)
    num_inputs: int | None = None
    num_outputs: int | None = None


class Exchange(Protocol):
    """One request that is ready to be sent; `answer` fills up while it runs."""

    answer: Answer

    async def run(self, clock: Clock) -> None:
        """Send, and read to the end. Raises `RequestError`."""


class Backend(Protocol):
    def prepare(self, plan: Plan) -> Exchange:
        """All that can be done before a request is due."""


@dataclass(slots=True)
class Progress:
    """How far a load is, for whoever shows it."""

    num_sent: int = 0
    num_done: int = 0
    num_failed: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Records in the order of the plans. `lags_s` are samples of how late this process woke up: times that are no
    longer than those say nothing of the server."""

    records: tuple[Record, ...]
    lags_s: tuple[float, ...]


@dataclass(slots=True)
class Driver:
    """`wait_until(t)` returns when `clock` is at t."""

    backend: Backend
    max_concurrency: int | None = None
    closed_loop: bool = False
    """With `max_concurrency`: a request is due when another one ends, not at a time."""
    timeout_s: float = 600.0
    clock: Clock = time.perf_counter
    wait_until: Callable[[float, Clock], Awaitable[None]] | None = None
    on_progress: Callable[[Progress], None] = lambda _: None
    progress: Progress = field(default_factory=Progress)

    async def run(self, plans: Sequence[Plan]) -> Load:
        """Raises nothing for what becomes of requests: that is in their records."""
        origin_s = self.clock()

        def now_s() -> float:
            return self.clock() - origin_s

        records: dict[int, Record] = {}
        lags_s: list[float] = []
        probe = asyncio.create_task(_probe(lags_s, now_s))
        try:
            async with asyncio.TaskGroup() as tasks:
                await (self._closed if self.closed_loop else self._open)(plans, tasks, records, now_s)
        finally:
            probe.cancel()
        return Load(tuple(records[plan.index] for plan in plans), tuple(lags_s))

    async def _open(
        self, plans: Sequence[Plan], tasks: asyncio.TaskGroup, records: dict[int, Record], now_s: Clock
    ) -> None:
        wait_until = self.wait_until or wait_precisely
        free = asyncio.Semaphore(self.max_concurrency or len(plans))

        async def one(plan: Plan, exchange: Exchange) -> None:
            async with free:  # what is waited here counts: the request was due
                records[plan.index] = await self._exchange(plan, exchange, plan.due_s, now_s)

        for plan in sorted(plans, key=lambda each: each.due_s):
            exchange = self.backend.prepare(plan)
            await wait_until(plan.due_s, now_s)
            tasks.create_task(one(plan, exchange))

    async def _closed(
        self, plans: Sequence[Plan], tasks: asyncio.TaskGroup, records: dict[int, Record], now_s: Clock
    ) -> None:
        left = iter(plans)

        async def one_after_another() -> None:
            for plan in left:
                exchange = self.backend.prepare(plan)
                records[plan.index] = await self._exchange(plan, exchange, now_s(), now_s)

        for _ in range(min(self.max_concurrency or len(plans), len(plans))):
            tasks.create_task(one_after_another())

    async def _exchange(self, plan: Plan, exchange: Exchange, due_s: float, now_s: Clock) -> Record:
        self.progress.num_sent += 1
        sent_s, error = now_s(), ""
        try:
            async with asyncio.timeout(self.timeout_s):
                await exchange.run(now_s)
        except TimeoutError:
            error = "timeout"
        except RequestError as failure:
            error = str(failure)
        self.progress.num_done += 1
        self.progress.num_failed += bool(error)
        self.on_progress(self.progress)
        answer = exchange.answer
        num_outputs = len(answer.tokens_s) if answer.num_outputs is None else answer.num_outputs
        num_inputs = plan.num_inputs if answer.num_inputs is None else answer.num_inputs
        return Record(plan.index, due_s, sent_s, now_s(), tuple(answer.tokens_s), num_inputs, num_outputs, error)


async def wait_precisely(due_s: float, now_s: Clock) -> None:
    """Timers of an event loop are up to 1 ms late: sleep short of the time, then turn the loop until it has come."""
    if (left_s := due_s - now_s() - TIMER_S) > 0:
        await asyncio.sleep(left_s)
    while now_s() < due_s:
        await asyncio.sleep(0)


async def _probe(lags_s: list[float], now_s: Clock) -> None:
    """How late the loop wakes who asked to be woken: up to 1 ms by the timer, the rest because it was busy."""
    while True:
        asked_s = now_s() + PROBE_S
        await asyncio.sleep(PROBE_S)
        lags_s.append(now_s() - asked_s)
