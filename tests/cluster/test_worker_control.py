"""What a worker does for its operators and by the client's clock: flushes, deadlines, traces in its log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from core.clock import ManualClock
from core.messages import AttemptFailed, CacheFlushed, FlushCache, Prefill, Prefilled, PromptPart, WorkerRole
from core.ticket import Ticket
from tests.cluster.running_worker import Router, Running, generate_locally, new_name, prompt_of, work

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def worker(clock: ManualClock) -> Iterator[Running]:
    running = Running("m", WorkerRole.MIXED, clock=clock)
    yield running
    running.close()


@pytest.fixture
def router(worker: Running) -> Router:
    return Router(worker)


def local() -> Ticket:
    return Ticket("request", 1, new_name(), "m", "m", 0)


def test_a_flushed_prefix_is_computed_again(router: Router) -> None:
    the_work = work(prompt_of(70), 1, salt=new_name())
    generate_locally(router, the_work)
    router.say(FlushCache())
    assert router.next(CacheFlushed).num_blocks == 4
    ticket = local()
    router.say(Prefill(ticket, the_work))
    assert router.next(Prefilled, ticket.key).num_cached_tokens == 0
    removed = [digest for change in router.changes for digest in change.removed]
    assert len(removed) == 4
    router.until_idle()


def test_what_a_running_request_holds_is_not_flushed(router: Router) -> None:
    ticket = local()
    router.say(Prefill(ticket, work(prompt_of(70), 900)))
    router.next(Prefilled, ticket.key)
    router.say(FlushCache())
    assert router.next(CacheFlushed).num_blocks == 0


def test_an_attempt_ends_with_the_deadline_of_its_request(router: Router, clock: ManualClock) -> None:
    ticket = local()
    router.say(Prefill(ticket, replace(work(prompt_of(20), 900), timeout_s=2.0)))
    router.next(Prefilled, ticket.key)
    clock.advance(1.9)
    router.wait_for_tokens(ticket.key)
    clock.advance(0.4)
    assert router.next(AttemptFailed, ticket.key).reason == "deadline_exceeded"
    router.until_idle()


def test_a_request_that_ended_in_time_is_not_failed_later(router: Router, clock: ManualClock) -> None:
    ticket = local()
    router.say(PromptPart(ticket, 0, prompt_of(20)[:8]))
    router.say(Prefill(ticket, replace(work(prompt_of(20), 1, offset=8), timeout_s=2.0)))
    router.next(Prefilled, ticket.key)
    clock.advance(5.0)
    router.until_idle()
    assert router.events() == []


def test_the_log_names_the_trace(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    ticket = replace(local(), traceparent=TRACEPARENT)
    with caplog.at_level(logging.DEBUG, "cluster.worker"):
        router.say(Prefill(ticket, work(prompt_of(20), 1)))
        router.next(Prefilled, ticket.key)
    (record,) = [record for record in caplog.records if record.getMessage() == "request request, attempt 1"]
    told = vars(record)
    assert (told["trace_id"], told["span_id"]) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
