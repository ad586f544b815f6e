"""Who goes next: fair between tenants, urgent first within one, and nobody for ever last."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from router.fair_queue import Claim, FairQueue
from router.ledger import Entry
from tests.router.test_admission import entry

tenants = st.sampled_from(["a", "b", "c"])
costs = st.floats(0.1, 10.0)


class Backlog:
    """A queue, and whom its entries are of."""

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.queue = FairQueue(weights or {})
        self.claims: dict[Entry, Claim] = {}
        self.seq = itertools.count()

    def push(self, tenant: str, cost: float = 1.0, due_s: float = 0.0) -> Entry:
        new = entry(next(self.seq))
        self.claims[new] = Claim(tenant, cost, due_s, 10)
        self.queue.push(new, self.claims[new])
        return new

    def serve(self) -> Claim:
        first = self.queue.first()
        assert first is not None
        self.queue.serve(first)
        return self.claims[first]

    def order(self) -> list[Entry]:
        served = []
        while (first := self.queue.first()) is not None:
            self.queue.serve(first)
            served.append(first)
        return served


@given(st.fixed_dictionaries({name: st.floats(0.5, 4.0) for name in "abc"}), st.lists(costs, min_size=60, max_size=60))
def test_tenants_that_always_wait_get_their_weights_of_what_is_served(
    weights: dict[str, float], sizes: list[float]
) -> None:
    backlog, served = Backlog(weights), Counter[str]()
    for tenant in "abc":
        for cost in sizes:
            backlog.push(tenant, cost)
    for _ in range(60):
        claim = backlog.serve()
        served[claim.tenant] += claim.cost  # type: ignore[assignment]
        if min(backlog.queue.num_of(tenant) for tenant in "abc") == 0:
            break
        shares = {tenant: served[tenant] / weights[tenant] for tenant in "abc"}
        step = max(max(sizes) / weight for weight in weights.values())
        assert max(shares.values()) - min(shares.values()) <= 2 * step


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 100)), min_size=1, max_size=20, unique=True))
def test_one_tenant_is_served_by_urgency(wanted: list[tuple[int, float]]) -> None:
    backlog = Backlog()
    entries = {
        backlog.push("a", due_s=arrived_s + 5.0 * priority): (priority, arrived_s) for priority, arrived_s in wanted
    }
    due = [backlog.claims[each].due_s for each in backlog.order()]
    assert due == sorted(due)
    assert len(due) == len(entries)


def test_equals_go_in_order_of_arrival() -> None:
    backlog = Backlog()
    entries = [backlog.push("a") for _ in range(5)]
    assert backlog.order() == entries


def test_an_urgent_tenant_does_not_starve_another() -> None:
    backlog = Backlog()
    for _ in range(10):
        backlog.push("pushy", due_s=-1e6)
        backlog.push("patient", due_s=1e6)
    served = Counter(backlog.serve().tenant for _ in range(10))
    assert served == {"pushy": 5, "patient": 5}


def test_time_without_requests_is_not_saved_up() -> None:
    backlog = Backlog()
    for _ in range(100):
        backlog.push("busy")
        backlog.serve()
    for _ in range(10):
        backlog.push("busy")
        backlog.push("idle")
    assert Counter(backlog.serve().tenant for _ in range(10)) == {"busy": 5, "idle": 5}


def test_a_tenant_cannot_gain_by_asking_for_one_thing_at_a_time() -> None:
    backlog, served = Backlog(), Counter[str]()
    for _ in range(40):
        backlog.push("steady")
    for _ in range(20):
        if not backlog.queue.num_of("sneaky"):
            backlog.push("sneaky")
        served[backlog.serve().tenant] += 1
    assert abs(served["steady"] - served["sneaky"]) <= 2


def test_who_comes_back_goes_first_and_has_paid() -> None:
    backlog = Backlog()
    first, second = backlog.push("a", cost=5.0), backlog.push("a", cost=5.0)
    other = backlog.push("b", cost=5.0)
    assert backlog.queue.serve(first) == 5.0
    backlog.queue.push(first, backlog.claims[first])
    assert backlog.queue.first() is first
    assert backlog.queue.serve(first) == 0.0
    assert backlog.order() == [other, second]


def test_of_those_that_come_back_the_oldest_goes_first() -> None:
    backlog = Backlog()
    entries = [backlog.push(tenant) for tenant in "abc"]
    for each in backlog.order():
        backlog.queue.push(each, backlog.claims[each])
    assert backlog.order() == entries


def test_stranded_entries_let_others_pass_and_come_back_to_their_place() -> None:
    backlog = Backlog()
    first, second = backlog.push("a"), backlog.push("a")
    backlog.queue.strand(first)
    assert backlog.queue.first() is second
    assert (len(backlog.queue), backlog.queue.stranded) == (2, (first,))
    backlog.queue.rescue(first)
    assert backlog.order() == [first, second]


def test_a_namesake_is_not_removed() -> None:
    backlog = Backlog()
    backlog.push("a")
    assert not backlog.queue.remove(entry(0))
    assert len(backlog.queue) == 1


@given(
    st.lists(st.tuples(tenants, costs, st.sampled_from([0.0, 1.0])), max_size=40),
    tenants,
    costs,
    st.just(0.0) | st.just(2.0),
)
def test_what_is_said_to_be_ahead_is_what_is_served_before(
    waiting: list[tuple[str, float, float]], tenant: str, cost: float, due_s: float
) -> None:
    """But for one request of each tenant: clocks move by whole requests."""
    backlog = Backlog({"a": 2.0})
    for each in waiting:
        backlog.push(*each)
    for _ in range(len(waiting) // 3):
        backlog.serve()
    said = backlog.queue.cost_ahead(Claim(tenant, cost, due_s))
    mine = backlog.push(tenant, cost, due_s)
    served = 0.0
    while (first := backlog.queue.first()) is not mine:
        assert first is not None
        served += backlog.queue.serve(first)
    assert abs(said - served) <= 3 * max((cost for _, cost, _ in waiting), default=0.0) + 1e-6


class Model(RuleBasedStateMachine):
    """Any order of what can happen to a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()
        self.waiting: set[Entry] = set()
        self.served: list[Entry] = []

    @rule(tenant=tenants, cost=costs, due_s=st.floats(0, 9))
    def arrive(self, tenant: str, cost: float, due_s: float) -> None:
        self.waiting.add(self.backlog.push(tenant, cost, due_s))

    @precondition(lambda self: self.backlog.queue.first() is not None)
    @rule()
    def serve_first(self) -> None:
        first = self.backlog.queue.first()
        assert first is not None
        self.backlog.queue.serve(first)
        self.waiting.remove(first)
        self.served.append(first)

    @precondition(lambda self: self.served)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        back = self.served.pop(data.draw(st.integers(0, len(self.served) - 1)))
        self.backlog.queue.push(back, self.backlog.claims[back])
        self.waiting.add(back)

    @precondition(lambda self: self.backlog.queue.first() is not None)
    @rule()
    def strand_first(self) -> None:
        first = self.backlog.queue.first()
        assert first is not None
        self.backlog.queue.strand(first)

    @rule()
    def rescue_all(self) -> None:
        for each in self.backlog.queue.stranded:
            self.backlog.queue.rescue(each)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.waiting, key=lambda each: each.seq)))
        assert self.backlog.queue.remove(gone)
        self.waiting.remove(gone)

    @invariant()
    def all_that_wait_are_there(self) -> None:
        queue = self.backlog.queue
        assert set(queue) == self.waiting
        assert queue.num_tokens == 10 * len(self.waiting)
        first = queue.first()
        assert (first is None) == (len(queue.stranded) == len(self.waiting))
        assert first not in queue.stranded


def test_nothing_is_lost_whatever_happens() -> None:
    run_state_machine_as_test(Model, settings=settings(max_examples=50, stateful_step_count=25, deadline=None))
