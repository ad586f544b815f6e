"""The load generator itself is honest: against servers of known delays, on a clock that is exact."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from benchmarks.serve.driver import Answer, Clock, Driver, Exchange, Load, Progress, RequestError
from benchmarks.serve.workload import Plan, arrivals_s
from tests.benchmarks.serve import virtual_time


@dataclass
class Server:
    """Computes one request after another, `service_s` each, as a server with one core does; tells its tokens then."""

    service_s: float
    gaps_s: Sequence[float] = ()
    fails: bool = False
    arrived_s: list[float] = field(default_factory=list)
    busy_until_s: float = 0.0

    def prepare(self, plan: Plan) -> Exchange:
        return _Exchange(self)


class _Exchange:
    def __init__(self, server: Server) -> None:
        self.answer = Answer()
        self._server = server

    async def run(self, clock: Clock) -> None:
        server, now_s = self._server, clock()
        server.arrived_s.append(now_s)
        server.busy_until_s = max(server.busy_until_s, now_s) + server.service_s
        await asyncio.sleep(server.busy_until_s - now_s)
        if server.fails:
            raise RequestError("as scripted")
        self.answer.tokens_s.append(clock())
        for gap_s in server.gaps_s:
            await asyncio.sleep(gap_s)
            self.answer.tokens_s.append(clock())


async def wait_until(due_s: float, now_s: Clock) -> None:
    await asyncio.sleep(due_s - now_s())


def plans(*due_s: float) -> list[Plan]:
    return [Plan(i, due, 10, 5) for i, due in enumerate(due_s)]


def drive(server: Server, planned: list[Plan], **options: object) -> Load:
    async def go() -> Load:
        settings: dict[str, object] = {"clock": virtual_time.now_s, "wait_until": wait_until, **options}
        return await Driver(server, **settings).run(planned)  # type: ignore[arg-type]

    return virtual_time.run(go())


def test_a_slow_server_does_not_slow_the_schedule() -> None:
    """Coordinated omission: a generator that waits for answers would send the tenth request after 27 s."""
    due_s = [float(i) for i in range(10)]
    server = Server(service_s=3.0)
    load = drive(server, plans(*due_s))
    assert server.arrived_s == pytest.approx(due_s)
    assert [record.sent_s for record in load.records] == pytest.approx(due_s)


def test_what_waits_for_a_slow_server_is_in_its_times() -> None:
    """Ten requests a second apart, three seconds of work each: the last one waits for nine others."""
    load = drive(Server(service_s=3.0), plans(*map(float, range(10))))
    assert [record.ttft_s for record in load.records] == pytest.approx([3.0 + 2.0 * i for i in range(10)])


def test_times_are_exactly_those_of_the_server() -> None:
    load = drive(Server(service_s=0.25, gaps_s=(0.5, 0.125, 2.0)), plans(1.0))
    (record,) = load.records
    assert record.gaps_s == pytest.approx((0.5, 0.125, 2.0))
    figures = record.ttft_s, record.longest_gap_s, record.tpot_s, record.e2e_s
    assert figures == pytest.approx((0.25, 2.0, 2.625 / 3, 2.875))


def test_waiting_for_concurrency_counts_because_the_request_was_due() -> None:
    load = drive(Server(service_s=2.0), plans(0.0, 0.0, 0.0), max_concurrency=1)
    assert [record.sent_s for record in load.records] == pytest.approx([0.0, 2.0, 4.0])
    assert [record.ttft_s for record in load.records] == pytest.approx([2.0, 4.0, 6.0])


def test_in_a_closed_loop_a_request_is_due_when_another_ends() -> None:
    load = drive(Server(service_s=2.0), plans(0.0, 0.0, 0.0), max_concurrency=1, closed_loop=True)
    assert [record.due_s for record in load.records] == pytest.approx([0.0, 2.0, 4.0])
    assert [record.ttft_s for record in load.records] == pytest.approx([2.0, 2.0, 2.0])


def test_a_failure_ends_no_other_request_and_is_told() -> None:
    seen: list[tuple[int, int, int]] = []

    def on_progress(progress: Progress) -> None:
        seen.append((progress.num_sent, progress.num_done, progress.num_failed))

    load = drive(Server(service_s=0.5, fails=True), plans(0.0, 1.0), on_progress=on_progress)
    assert [(record.error, record.ttft_s) for record in load.records] == [("as scripted", None)] * 2
    assert seen == [(1, 1, 1), (2, 2, 2)]


def test_a_request_that_takes_too_long_is_given_up_with_what_had_come() -> None:
    load = drive(Server(service_s=1.0, gaps_s=(1.0, 100.0)), plans(0.0, 5.0), timeout_s=10.0)
    assert [record.error for record in load.records] == ["timeout"] * 2
    assert load.records[0].tokens_s == pytest.approx((1.0, 2.0))
    assert load.records[0].end_s == pytest.approx(10.0)


def test_records_are_in_the_order_of_the_plans_whatever_ends_first() -> None:
    load = drive(Server(service_s=0.0), [Plan(0, 9.0, 1, 1), Plan(1, 1.0, 2, 1)])
    assert [(record.index, record.due_s, record.num_inputs) for record in load.records] == [(0, 9.0, 1), (1, 1.0, 2)]


def test_no_requests_are_no_load() -> None:
    assert drive(Server(1.0), []).records == ()


def test_a_schedule_of_many_is_kept_to_the_microsecond() -> None:
    due_s = arrivals_s(500, rate=20.0, burstiness=0.5, seed=3)
    server = Server(service_s=0.2)
    drive(server, plans(*due_s))
    assert max(abs(arrived - due) for arrived, due in zip(server.arrived_s, due_s, strict=True)) < 1e-6
