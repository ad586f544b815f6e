"""A request that is parked ends as any other: by its router, its session, its lease; and it is told of as it should."""

import dataclasses
from collections.abc import Iterator

import pytest

from core.clock import ManualClock
from core.messages import Cancel, Heartbeat, Prefill, Prefilled, Released, WorkerRole
from core.ticket import AttemptKey, Ticket
from tests.cluster.running_worker import (
    CONFIG,
    TRANSFER,
    WAIT_S,
    Router,
    Running,
    generate_locally,
    new_name,
    prompt_of,
    rest,
    work,
)

SMALL = dataclasses.replace(CONFIG, num_blocks=12)
A, B = (work(prompt_of(33, first=first), 100, temperature=0.8, seed=first) for first in (3, 5))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def worker(clock: ManualClock) -> Iterator[Running]:
    running = Running("m", WorkerRole.MIXED, clock=clock, config=SMALL)
    yield running
    running.close()


def parked(worker: Running, a: Router, b: Router) -> tuple[Ticket, Ticket, list[int]]:
    """Two requests, the younger has just been parked; their first tokens. The worker stands before it copies."""
    worker.steps.stop_at = lambda plan: bool(plan.swaps_out)
    tickets, firsts = [], []
    for router, the_work in ((a, A), (b, B)):
        ticket = Ticket("request", 1, new_name(), "m", "m", 0)
        router.say(Prefill(ticket, the_work))
        firsts.append(router.next(Prefilled, ticket.key).first_token_id)
        tickets.append(ticket)
    worker.steps.begun.get(timeout=WAIT_S)
    return tickets[0], tickets[1], firsts


def expect_gone(router: Router, key: AttemptKey, first: int) -> None:
    """Nothing is parked, and the other goes on as if alone."""
    tokens = [first, *rest(router, key)]
    router.until_idle()
    assert router.load is not None
    assert (router.load.num_parked, router.load.parked_bytes) == (0, 0)
    assert (router.load.num_parks, router.load.num_recomputes) == (1, 0)
    assert generate_locally(router, A) == tokens


def test_a_parked_request_comes_back_and_both_write_what_they_write_alone(worker: Running) -> None:
    router = Router(worker)
    a, b, firsts = parked(worker, router, router)
    worker.steps.resume()
    router.until_load(lambda load: load.num_parked == 1 and load.parked_bytes > 0)
    together = [[first, *rest(router, t.key)] for first, t in zip(firsts, (a, b), strict=True)]
    router.until_idle()
    assert router.load is not None
    assert (router.load.num_parked, router.load.parked_bytes, router.load.num_recomputes) == (0, 0, 0)
    assert router.load.num_parks >= 1
    assert [generate_locally(router, each) for each in (A, B)] == together


def test_a_parked_request_that_is_cancelled_frees_its_host_memory(worker: Running) -> None:
    router = Router(worker)
    a, b, firsts = parked(worker, router, router)
    router.say(Cancel(b, "client"))
    worker.steps.resume()
    router.next(Released, b.key)
    expect_gone(router, a.key, firsts[0])


def test_a_parked_request_ends_with_its_session(worker: Running) -> None:
    north, south = Router(worker), Router(worker)
    a, _, firsts = parked(worker, north, south)
    south.hang_up()
    worker.steps.resume()
    expect_gone(north, a.key, firsts[0])


def test_a_parked_request_ends_with_its_lease(worker: Running, clock: ManualClock) -> None:
    router = Router(worker)
    a, b, firsts = parked(worker, router, router)
    clock.advance(TRANSFER.lease_s - 1)
    router.say(Heartbeat((a.transfer_id,)))
    clock.advance(2)
    worker.steps.resume()
    assert router.failure(b.key) == "lease_expired"
    expect_gone(router, a.key, firsts[0])


def test_a_copy_that_fails_costs_the_others_their_step_and_the_parked_its_kv(worker: Running) -> None:
    router = Router(worker)
    a, b, firsts = parked(worker, router, router)
    worker.steps.failures.append(RuntimeError("no host memory"))
    worker.steps.resume()
    assert router.failure(a.key) == "internal"
    tokens = [firsts[1], *rest(router, b.key)]
    router.until_idle()
    assert router.load is not None
    assert router.load.num_recomputes == 1
    assert generate_locally(router, B) == tokens
