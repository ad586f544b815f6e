"""One worker's loop: what it refuses, how long it waits, what a failed step costs, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from llguidance import LLMatcher

from core.clock import ManualClock
from core.errors import IntegrityError
from core.messages import (
    AttemptFailed,
    CacheChanged,
    Cancel,
    Connect,
    Drain,
    Drained,
    Heartbeat,
    PairDown,
    Prefill,
    Prefilled,
    PromptPart,
    Refused,
    Released,
    Reserve,
    WorkerRole,
)
from core.request import FinishReason
from core.ticket import Ticket
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

LEASE_S = TRANSFER.lease_s
ENDLESS = 900
"""Tokens that take some seconds to write."""


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


def local(name: str | None = None, attempt: int = 1) -> Ticket:
    return Ticket("request", attempt, name or new_name(), "m", "m", 0)


def start(router: Router, prompt_tokens: int = 20, max_tokens: int = ENDLESS) -> Ticket:
    """A local request that has written its first token."""
    ticket = local()
    router.say(Prefill(ticket, work(prompt_of(prompt_tokens), max_tokens)))
    router.next(Prefilled, ticket.key)
    return ticket


# ---- a request of its own


def test_a_local_request_is_written_to_its_end(router: Router) -> None:
    ticket = start(router, max_tokens=5)
    sequences = [*router.tokens(ticket.key)]
    assert [(len(s.token_ids), s.finish) for s in sequences] == [(1, None)] * 3 + [(1, FinishReason.LENGTH)]
    router.until_idle()


def test_a_request_whose_grammar_can_not_go_on_fails_alone(router: Router) -> None:
    grammar = LLMatcher.grammar_from_regex("[0-9]+")
    broken, sound = local(), local()
    before = work(prompt_of(20), 8)
    streamed = replace(before, num_prompt_tokens=19, sampling=replace(before.sampling, grammar=grammar))
    router.say(Prefill(broken, streamed), Prefill(sound, work(prompt_of(20, first=9), 3)))
    failed = router.next(AttemptFailed, broken.key)
    assert (failed.reason, "grammar can't go on" in failed.message) == ("grammar", True)
    router.next(Prefilled, sound.key)
    assert sum(len(s.token_ids) for s in router.tokens(sound.key)) == 2
    router.until_idle()


def test_a_local_request_of_one_token_ends_at_once(router: Router) -> None:
    ticket = local()
    router.say(Prefill(ticket, work(prompt_of(20), 1)))
    assert router.next(Prefilled, ticket.key).finish is FinishReason.LENGTH
    router.until_idle()
    assert router.events() == []


def test_tokens_do_not_depend_on_company(router: Router) -> None:
    """Nor on preemption: together the eight need more blocks than there are."""
    works = [work(prompt_of(130, first=i), 45, temperature=0.7, seed=i) for i in range(8)]
    tickets = [local() for _ in works]
    router.say(*[Prefill(ticket, each) for ticket, each in zip(tickets, works, strict=True)])
    firsts = [router.next(Prefilled, ticket.key).first_token_id for ticket in tickets]
    together = [[first, *rest(router, t.key)] for first, t in zip(firsts, tickets, strict=True)]
    router.until_idle()
    assert router.load is not None
    assert router.load.num_preemptions > 0
    assert [generate_locally(router, each) for each in works] == together


def test_a_prompt_says_how_much_of_it_was_found(router: Router) -> None:
    tickets, salt = [local() for _ in range(2)], new_name()
    for ticket, expected in zip(tickets, (0, 64), strict=True):
        router.say(Prefill(ticket, work(prompt_of(70), 1, salt=salt)))
        assert router.next(Prefilled, ticket.key).num_cached_tokens == expected


def test_what_was_asked_before_is_found_and_told(router: Router, worker: Running) -> None:
    """Whoever comes later is told of all that is cached, before anything else."""
    prompt, salt = prompt_of(70), new_name()
    first, again = (generate_locally(router, work(prompt, 30, salt=salt)) for _ in range(2))
    assert first == again
    assert router.load is not None
    assert (router.load.num_prefix_queries, router.load.num_prefix_hits) == (140, 64)
    late = Router(worker)
    late.catch_up()
    assert router.changes[0] == CacheChanged(cleared=True)
    assert not any(change.removed for change in router.changes)
    told = {digest for change in router.changes for digest in change.stored}
    assert late.changes == [CacheChanged(late.changes[0].stored, cleared=True)]
    assert set(late.changes[0].stored) == told
    assert len(told) == (70 + 29) // 16


# ---- refusals


@pytest.mark.parametrize(
    ("command", "reason", "message"),
    [
        (Prefill(replace(local(), prefill_incarnation="old"), work([1])), "wrong_incarnation", "for worker old, this"),
        (Reserve(replace(local(), decode_incarnation="old"), work([1])), "wrong_incarnation", "for worker old, this"),
        (Prefill(local(), work(prompt_of(1024))), "invalid", "1024 prompt tokens, must be in [1, 1024)"),
        (Prefill(local(), replace(work([1]), token_ids=())), "invalid", "0 prompt tokens, must be in [1, 1024)"),
        (Prefill(local(), work([1, 2], offset=1)), "invalid", "1 prompt tokens came, 2 were announced"),
        (Reserve(Ticket("r", 1, "t", "other", "m", 1), work([1])), "pair_down", "no channel"),
    ],
    ids=["prefill of another", "reserve of another", "too long", "empty", "part missing", "no pair"],
)
def test_what_cannot_be_done_fails_and_holds_nothing(
    router: Router, command: Prefill | Reserve, reason: str, message: str
) -> None:
    router.say(command)
    failed = router.next(AttemptFailed, command.ticket.key)
    assert failed.reason == reason
    assert message in failed.message
    router.until_idle()


def test_a_pair_that_is_not_its_own_is_down_for_good(worker: Running, router: Router) -> None:
    router.say(Connect("x", "y", 1, worker.kv.address, worker.engine.layout))
    down = router.next(PairDown)
    assert (down.prefill_incarnation, down.decode_incarnation, down.permanent) == ("x", "y", True)


def test_a_later_attempt_ends_an_earlier_one_even_where_it_can_t_begin(router: Router) -> None:
    """The router has given the earlier one up, whatever becomes of the later."""
    name = new_name()
    router.say(Prefill(local(name), work(prompt_of(20), ENDLESS)))
    router.next(Prefilled, (name, 1))
    router.say(Reserve(Ticket("request", 2, name, "other", "m", 1), work(prompt_of(20))))
    assert router.failure((name, 1)) == "stale_attempt"
    assert router.failure((name, 2)) == "pair_down"
    router.until_idle()


# ---- leases


def test_nobody_s_request_ends_with_its_lease(clock: ManualClock, router: Router) -> None:
    ticket = start(router)
    clock.advance(LEASE_S)
    assert router.failure(ticket.key) == "lease_expired"
    router.until_idle()


def test_a_heartbeat_keeps_what_it_names_and_no_more(clock: ManualClock, router: Router) -> None:
    kept, lost = start(router), start(router)
    clock.advance(LEASE_S - 1)
    router.say(Heartbeat((kept.transfer_id,)))
    clock.advance(2)
    assert router.failure(lost.key) == "lease_expired"
    router.wait_for_tokens(kept.key)
    assert not [event for event in router.events() if isinstance(event, AttemptFailed)]


def test_a_heartbeat_counts_though_a_step_takes_long(clock: ManualClock, worker: Running, router: Router) -> None:
    ticket = start(router, max_tokens=20)
    worker.steps.pause()
    worker.steps.begun.get(timeout=WAIT_S)
    for _ in range(4):
        clock.advance(LEASE_S - 1)
        router.say(Heartbeat((ticket.transfer_id,)))
    worker.steps.resume()
    assert len(rest(router, ticket.key)) == 19


# ---- steps that fail


def test_a_failed_step_fails_its_requests_alone(worker: Running, router: Router) -> None:
    worker.steps.pause()
    failing, waiting = local(), local()
    router.say(Prefill(failing, work(prompt_of(900))))
    worker.steps.begun.get(timeout=WAIT_S)
    router.say(Prefill(waiting, work(prompt_of(200), 5)))  # for which there is no room
    worker.steps.failures.append(RuntimeError("no memory"))
    worker.steps.resume()
    failed = router.next(AttemptFailed, failing.key)
    assert (failed.reason, failed.message) == ("internal", "a step failed: no memory")
    router.next(Prefilled, waiting.key)
    assert len(rest(router, waiting.key)) == 4
    router.until_idle()


def test_a_step_that_succeeds_clears_the_count(worker: Running, router: Router) -> None:
    for _ in range(3):
        for _ in range(2):
            worker.steps.failures.append(RuntimeError("once"))
            ticket = local()
            router.say(Prefill(ticket, work(prompt_of(20))))
            assert router.failure(ticket.key) == "internal"
        assert len(generate_locally(router, work(prompt_of(20), 3))) == 3
    assert worker.error is None


def test_three_failed_steps_in_a_row_end_the_worker(worker: Running, router: Router) -> None:
    worker.steps.failures += [RuntimeError("first"), RuntimeError("second"), RuntimeError("third")]
    for _ in range(2):
        ticket = local()
        router.say(Prefill(ticket, work(prompt_of(20))))
        assert router.failure(ticket.key) == "internal"
    last = local()
    router.say(Prefill(last, work(prompt_of(20))))
    assert str(worker.wait()) == "third"
    router.until_end()
    assert router.failure(last.key) == "internal"
    assert worker.engine.pool.num_free_blocks == CONFIG.num_blocks


def test_a_leak_ends_the_worker(worker: Running, router: Router, clock: ManualClock) -> None:
    worker.engine.pool.allocate("nobody", 20)
    clock.advance(1.0)
    assert isinstance(worker.wait(), IntegrityError)
    worker.engine.pool.free("nobody")


# ---- drain and stop


def by_signal(worker: Running, router: Router, deadline_s: float) -> None:
    worker.worker.post(Drain(deadline_s))


def by_router(worker: Running, router: Router, deadline_s: float) -> None:
    router.say(Drain(deadline_s))


@pytest.fixture(params=[by_signal, by_router])
def drain(request: pytest.FixtureRequest) -> Callable[[Running, Router, float], None]:
    ask: Callable[[Running, Router, float], None] = request.param
    return ask


Ask = Callable[[Running, Router, float], None]


def test_an_idle_worker_drains_at_once(worker: Running, router: Router, clock: ManualClock, drain: Ask) -> None:
    router.catch_up()
    drain(worker, router, 30.0)
    clock.advance(1.0)
    router.next(Drained)
    router.until_end()
    assert worker.wait() is None


def test_a_draining_worker_takes_nothing_new_and_finishes_the_rest(
    worker: Running, router: Router, clock: ManualClock, drain: Ask
) -> None:
    worker.steps.pause()
    ticket, late = local(), local()
    router.say(Prefill(ticket, work(prompt_of(20), 30)))
    worker.steps.begun.get(timeout=WAIT_S)
    drain(worker, router, 30.0)
    router.say(Prefill(late, work(prompt_of(20))))
    worker.steps.resume()
    assert router.next(Refused) == Refused(late.key, "draining")
    assert router.load is not None
    assert router.load.draining
    assert len([router.next(Prefilled).first_token_id, *rest(router, ticket.key)]) == 30
    clock.advance(1.0)
    router.next(Drained)
    assert worker.wait() is None
    assert worker.engine.pool.num_free_blocks == CONFIG.num_blocks


def test_draining_ends_at_its_deadline(worker: Running, router: Router, clock: ManualClock, drain: Ask) -> None:
    ticket = start(router)
    drain(worker, router, 2.0)
    router.until_load(lambda load: load.draining)
    clock.advance(1.9)
    router.wait_for_tokens(ticket.key)
    clock.advance(0.2)
    router.next(Drained)
    assert worker.wait() is None


def test_what_runs_may_be_cancelled_while_it_drains(worker: Running, router: Router, clock: ManualClock) -> None:
    ticket = start(router)
    router.say(Drain(30.0), Cancel(ticket, "why"))
    router.next(Released, ticket.key)
    clock.advance(1.0)
    router.next(Drained)


def test_parts_alone_do_not_keep_a_draining_worker(worker: Running, router: Router, clock: ManualClock) -> None:
    router.say(PromptPart(local(), 0, prompt_of(20)), Drain(30.0))
    clock.advance(1.0)
    router.next(Drained)
    assert worker.wait() is None


def test_stop_ends_it_at_once(worker: Running, router: Router) -> None:
    start(router)
    worker.close()
    assert worker.error is None
